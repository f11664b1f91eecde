"""A site of feed-forward experts, as a lowering gets it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from ..trace.ffn_placeholder import TracedFeedForward


@dataclass(frozen=True)
class Site:
    """One placeholder and what it computes.

    call: the region's call.
    x: (T, width) rows.
    gates: (T, E).
    weights: of each expert, in the order in which `body` takes them after the rows.
    top_k: most experts that a row goes to; None: no bound.
    width: of the rows.
    body: one expert's graph.
    tensors: values of the weights, by name.
    """

    call: TracedFeedForward
    x: ir.Value
    gates: ir.Value
    weights: list[list[ir.Value]]
    top_k: int | None
    width: int
    body: ir.Graph
    tensors: dict[str, torch.Tensor]
