"""Masks of attention, read once for all layers.

`scaled_dot_product_attention` turns a mask of truth values into one of 0 and minus infinity at every
call, and in training keeps it for the backward pass: (batch, 1, S, S) numbers a layer. Layers that
share the mask now share its numbers, or none where a call needs none; see `attend`. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..frontend.capture import TRACING
from ..ir.aten import value
from ..ir.ops import alias_root, mutated
from ..ir.program import Program
from .attend import attention_of, call_attend, read_mask


def share_masks(program: Program) -> None:
    """Let layers that attend under one mask read it once, in place."""
    users: dict[tuple[fx.Node, torch.dtype], dict[fx.Node, tuple[Any, ...]]] = {}
    written = {alias_root(w) for node in program.graph.nodes for w in mutated(node)}
    for node in program.graph.nodes:
        if (given := attention_of(node)) is None:
            continue
        query, _, _, _, mask, *_ = given
        if isinstance(mask, fx.Node) and value(mask).dtype == torch.bool:
            users.setdefault((mask, value(query).dtype), {})[node] = given
    for (mask, dtype), layers in users.items():
        if alias_root(mask) in written:
            continue
        with program.graph.inserting_after(mask):
            read = program.graph.call_function(read_mask, (mask, dtype))
        with TRACING:  # a trace of another thread would look at these sizes
            read.meta = {"val": read_mask(value(mask), dtype)}
        for layer, (query, key, values, repeats, _, *rest) in layers.items():
            call_attend(layer, query, key, values, repeats, read, *rest)
