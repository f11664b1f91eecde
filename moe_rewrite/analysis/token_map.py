"""The map of patches that became a vision transformer's tokens, read from the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, reach, value
from ..ir.ops import first, is_pointwise, op
from ..ir.program import Program

Sides = tuple[int, int]


def find_token_map(program: Program, cut: fx.Node) -> Sides | None:
    """(H, W) of the map that is flattened to tokens before the cut; None without one, or if its
    sizes are open. Of several maps, the last."""
    before = reach(cut, lambda n: n.all_input_nodes)
    found = (_flattened(node) for node in reversed(program.graph.nodes) if node in before)
    return next((sides for sides in found if sides is not None), None)


def _flattened(node: fx.Node) -> Sides | None:
    """The sides of the map that this node flattens: of a convolution's output (B, C, H, W), or of
    (B, H, W, C) where its channels were moved to the end."""
    source = first(node)
    if not op(node).view or not isinstance(source, fx.Node) or _rank(source) != 4:
        return None
    moved = _moves_from_convolution(source)
    if moved is None or _rank(node) != 3:
        return None
    _, *sizes = map(expression, value(source).shape)
    (rows, cols), channels = (sizes[:2], sizes[2]) if moved % 2 else (sizes[1:], sizes[0])
    merged = [rows * cols, channels] if moved % 2 else [channels, rows * cols]
    if [expression(s) for s in value(node).shape[1:]] != merged:
        return None
    fixed = isinstance(rows, int) and isinstance(cols, int)
    return (rows, cols) if fixed else None


def _moves_from_convolution(node: fx.Node) -> int | None:
    """How often dimensions were moved between a convolution and this node; None if it does not
    come from one by work on each position."""
    moved = 0
    while op(node).product != "filter":
        works = is_pointwise(node) or op(node).normalized or op(node).positions == "map"
        if not (works or op(node).transposes) or not isinstance(first(node), fx.Node):
            return None
        moved += op(node).transposes
        node = first(node)
    return moved


def _rank(node: fx.Node) -> Any:
    made = value(node)
    return made.ndim if isinstance(made, torch.Tensor) else None
