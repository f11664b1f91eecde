"""Several feature vectors a position: residual streams."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.aten import value
from ..ir.program import Program
from .row_dims import same_sizes


def order_of_streams(program: Program, node: fx.Node) -> list[int] | None:
    """The dimensions of a value of streams as (batch, positions, streams, width); None where it
    does not have the positions of ids as two of its dimensions, as no map has."""
    shape = value(node).shape
    leaves = [v for v in map(value, program.leaves()) if isinstance(v, torch.Tensor)]
    ids = [v.shape for v in leaves if v.ndim == 2 and not v.is_floating_point()]
    for order in ([0, 1, 2, 3], [1, 2, 0, 3]) if len(shape) == 4 else ():
        rows, rest = [shape[d] for d in order[:2]], [shape[d] for d in order[2:]]
        if all(isinstance(s, int) for s in rest) and any(same_sizes(s, rows) for s in ids):
            return order
    return None
