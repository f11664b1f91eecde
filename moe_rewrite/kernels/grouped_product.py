"""Sorted rows times the weight of each group, with the gradients that are needed.

transformers' operator for this (`grouped_mm_fallback`, which a trace of its experts has) computes the
gradient of the weights of a frozen model's own experts too, as much work as its forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def group_sizes(ends_G: torch.Tensor, rows: int) -> list[int]:
    """How many rows each group has, then how many lie after the last group."""
    return [end - start for start, end in pairwise([0, *ends_G.tolist(), rows])]


def empty_rows(sizes: list[int], width: int, like: torch.Tensor) -> torch.Tensor:
    """(T, width), to be filled group by group; rows after the last group are zero."""
    made = like.new_empty(sum(sizes), width)
    made[made.shape[0] - sizes[-1] :] = 0
    return made


def per_group(
    sizes: list[int], rows: Sequence[torch.Tensor], stacks: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each group with rows: its rows of each of `rows`, its matrix of each of `stacks`."""
    parts = *(t.split(sizes) for t in rows), *(t.unbind() for t in stacks)
    for size, *mine in zip(sizes, *parts, strict=False):  # sizes and rows: one more at the end
        if size:
            yield tuple(mine)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.sizes = group_sizes(ends, x.shape[0])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        y = empty_rows(ctx.sizes, w.shape[2], x)
        for x_g, y_g, w_g in per_group(ctx.sizes, (x, y), (w,)):
            torch.mm(x_g, w_g, out=y_g)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = empty_rows(ctx.sizes, w.shape[1], dy)
            for dy_g, dx_g, w_g in per_group(ctx.sizes, (dy, dx), (w.mT,)):
                torch.mm(dy_g, w_g, out=dx_g)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(ctx.sizes, x, dy, w)
        return dx, dw, None


def weight_gradient(
    sizes: list[int], x: torch.Tensor, dy: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """``x^T dy`` of each group (G, ., .), shaped as `like`; zero where a group has no rows."""
    made = torch.zeros_like(like)
    for x_g, dy_g, made_g in per_group(sizes, (x, dy), (made,)):
        torch.mm(x_g.t(), dy_g, out=made_g)
    return made
