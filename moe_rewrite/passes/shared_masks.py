"""Masks of attention, made into numbers once for all layers.

`scaled_dot_product_attention` turns a mask of truth values into one of 0 and minus infinity at every
call, and in training keeps it for the backward pass: (batch, 1, S, S) numbers a layer. Layers that
share the mask now share its numbers. Exact: they are the same.
"""

from __future__ import annotations

import torch
from torch import fx

from ..frontend.capture import TRACING
from ..ir.aten import value
from ..ir.ops import alias_root, argument, mutated, op_name, set_argument
from ..ir.program import Program


def as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a position is attended to, minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def share_masks(program: Program) -> None:
    """Give layers that attend under one mask one tensor of numbers, in place."""
    users: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    written = {alias_root(w) for node in program.graph.nodes for w in mutated(node)}
    for node in program.graph.nodes:
        if op_name(node) != "scaled_dot_product_attention":
            continue
        mask, rows = argument(node, "attn_mask"), value(argument(node, "query"))
        if isinstance(mask, fx.Node) and value(mask).dtype == torch.bool:
            users.setdefault((mask, rows.dtype), []).append(node)
    for (mask, dtype), layers in users.items():
        if len(layers) > 1 and alias_root(mask) not in written:
            with program.graph.inserting_after(mask):
                numbers = program.graph.call_function(as_numbers, (mask, dtype))
            with TRACING:  # a trace of another thread would look at these sizes
                numbers.meta = {"val": as_numbers(value(mask), dtype)}
            for layer in layers:
                set_argument(layer, "attn_mask", numbers)
