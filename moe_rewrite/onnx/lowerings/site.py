"""What a lowering is given of a site."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from ..trace.ffn_placeholder import TracedFeedForward


@dataclass(frozen=True)
class Site:
    """x: (T, width) rows. gates: (T, E). weights: of each expert, as `body` takes them behind its
    rows. per_row: to how many experts a row goes at most, None: no bound but their number.
    tensors: the values of weights, by name."""

    call: TracedFeedForward
    x: ir.Value
    gates: ir.Value
    weights: list[list[ir.Value]]
    top_k: int | None
    width: int
    body: ir.Graph
    tensors: dict[str, torch.Tensor]
