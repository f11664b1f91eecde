"""Attention as a converted model's steps call it, and the form in which they take its mask.

A graph has its mask as values, since a call may be padded. Where the values of a call say no more
than that, rows attend to all of a call's positions, or each to itself and those before it: then
PyTorch's kernel is called without a mask, as transformers calls it, and skips what it may.
Exact: the kernel adds the same products in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.ops import argument, op_name

CAUSAL = "causal"  # each row attends to itself and to all before it
Mask = torch.Tensor | str | None  # numbers to add to scores, CAUSAL, or None: all attend to all
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale")


def read_mask(mask: torch.Tensor, dtype: torch.dtype) -> Mask:
    """What the truth values (..., S, T) of a mask say; as numbers 0 where a row attends, minus
    infinity elsewhere. They are looked at where that is a matter of microseconds: on the CPU."""
    if _is_readable(mask):
        if mask.all():
            return None
        rows, positions = mask.shape[-2:]
        if rows == positions and torch.equal(mask, _causal(rows).expand_as(mask)):
            return CAUSAL
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _is_readable(mask: torch.Tensor) -> bool:
    plain = type(mask) is torch.Tensor and mask.is_cpu
    return plain and not torch.compiler.is_compiling() and not _is_traced()


def _is_traced() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _causal(rows: int) -> torch.Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril_()


def attend(
    query_BHSD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, repeats: int,
    mask: Mask, dropout: float, causal: bool, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """(B, H, S, D) scaled dot product attention, H = G * repeats. mask: as PyTorch's, or what
    `read_mask` returns; causal without one."""
    if isinstance(mask, str):
        mask, causal = None, True
    key, values = key_BGTD, value_BGTD
    shares = repeats > 1 and query_BHSD.is_cpu and not torch.is_grad_enabled() and not _is_traced()
    if repeats > 1 and not shares:
        key, values = (
            t.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, values)
        )
    return torch.nn.functional.scaled_dot_product_attention(
        query_BHSD, key, values, mask, dropout, causal, scale=scale, enable_gqa=shares
    )


def attention_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments with which `attend` computes what a node does; None if it does not."""
    if node.target is attend:
        return node.args
    if op_name(node) != "scaled_dot_product_attention" or argument(node, "enable_gqa"):
        return None
    tensors = (argument(node, name) for name in ("query", "key", "value"))
    return (*tensors, 1, *(argument(node, name) for name in OPTIONS))


def call_attend(node: fx.Node, *given: Any) -> None:
    """Let a node be a call of `attend` with these arguments."""
    node.target, node.args, node.kwargs = attend, given, {}
