"""Sorted rows times the weight of each group, with the gradients that are needed.

transformers' operator for this (`grouped_mm_fallback`, which a trace of its experts has) computes the
gradient of the weights of a frozen model's own experts too, as much work as its forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

NAME = "transformers.grouped_mm_fallback.default"


def in_eager(operator: Any) -> Any:
    """What computes an operator's result where nothing is compiled: the operator itself, but for
    transformers' grouped product."""
    return grouped_product if str(operator) == NAME else operator


def grouped_product(x_TI: torch.Tensor, w_GIO: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """(T, O): the rows of each group times its weight, rows after the last group zero. ends_G: int32
    or int64, where the groups end. Bitwise what transformers' operator gives; differentiable once."""
    if x_TI.is_meta:
        return torch.ops.transformers.grouped_mm_fallback(x_TI, w_GIO, ends_G)
    return _GroupedProduct.apply(x_TI, w_GIO, ends_G)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.ends = ends.tolist()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        y = x.new_empty(x.shape[0], w.shape[2])
        for group, rows in _groups(ctx.ends, y):
            torch.mm(x[rows], w[group], out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(dy.shape[0], w.shape[1])
            for group, rows in _groups(ctx.ends, dx):
                torch.mm(dy[rows], w[group].t(), out=dx[rows])
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(w)
            for group, rows in _groups(ctx.ends):
                torch.mm(x[rows].t(), dy[rows], out=dw[group])
        return dx, dw, None


def _groups(ends: list[int], into: torch.Tensor | None = None) -> Iterator[tuple[int, slice]]:
    """(group, its rows), of groups with rows. into: of which the rows of no group are set to zero."""
    if into is not None:
        into[ends[-1] if ends else 0 :] = 0
    for group, (start, end) in enumerate(pairwise([0, *ends])):
        if end > start:
            yield group, slice(start, end)
