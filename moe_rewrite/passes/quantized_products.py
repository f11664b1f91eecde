"""Operations on quantised weights, in the form that the library which stores them implements.

A quantised weight is a subclass of torch.Tensor, whose library overrides PyTorch's functions
(`torch.nn.functional.linear`). The operators that a trace writes (`aten.linear`) go past these: they
are taken apart before the subclass sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..ir.program import Program
from ..utils.quantized import is_quantized

aten = torch.ops.aten


class _Product(torch.autograd.Function):
    """The library's product, with the gradient of the dequantised one (QLoRA, arXiv 2305.14314,
    section 3): libraries keep a dequantised copy of each weight for it, and none that rounds its
    rows has one. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight  # frozen, so no version of it is checked
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        dx = dy @ ctx.weight.dequantize().to(dy.dtype)
        bias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a quantised weight (O, D), as its library computes it; x (..., D). In a trace
    for export the weight is a plain one."""
    if is_quantized(weight) and torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def embedding(
    weight: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`aten.embedding` of a frozen table: the options change its gradient alone."""
    return F.embedding(indices, weight)


FUNCTIONS: dict[Any, Callable] = {
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.conv2d.default: F.conv2d,
}


def call_functions(program: Program) -> None:
    """Let the operators that read a quantised weight be calls of these functions."""
    for placeholder in program.graph.find_nodes(op="placeholder"):
        for node in placeholder.users if program.quantized(placeholder) else ():
            node.target = FUNCTIONS.get(node.target, node.target)
