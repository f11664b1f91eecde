"""Sorted rows times the weight of each group, and LoRA experts that have factors for each group, as one
operation: a model's own experts with experts beside their weights.

T sorted rows, G groups, I input width, O output width, R ranks of all LoRA experts together. Saved
for the backward pass: the rows, ``x A^T``, and the factors as they are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..grouped_product import empty_rows, group_sizes, per_group, weight_gradient


def lora_sorted(
    x_TI: torch.Tensor,
    w_GIO: torch.Tensor,
    scales_TR: torch.Tensor,
    a_RIG: torch.Tensor,
    b_ORG: torch.Tensor,
    ends_G: torch.Tensor,
) -> torch.Tensor:
    """``x W_g + ((x A_g^T) * scales) B_g^T`` of each row with its group g; rows after the last group
    are zero. ends_G: where the groups end. Differentiable once; what is frozen gets no gradient.

    With B of zero, bitwise the grouped product alone."""
    return _Sorted.apply(x_TI, w_GIO, scales_TR, a_RIG, b_ORG, ends_G)


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, ends: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        sizes = group_sizes(ends, x.shape[0])
        # these layouts take a CPU the least time, forward and backward
        a_GRI, b_GRO = a.permute(2, 0, 1).contiguous(), b.permute(2, 1, 0).contiguous()
        low = empty_rows(sizes, a.shape[0], x)
        for x_g, low_g, a_g in per_group(sizes, (x, low), (a_GRI.mT,)):
            torch.mm(x_g, a_g, out=low_g)
        y = empty_rows(sizes, w.shape[2], x)
        for x_g, low_g, y_g, w_g, b_g in per_group(sizes, (x, low * scales, y), (w, b_GRO)):
            torch.mm(x_g, w_g, out=y_g)
            y_g.addmm_(low_g, b_g)
        ctx.sizes = sizes
        ctx.save_for_backward(x, w, scales, low, a_GRI, b_GRO)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, scales, low, a, b = ctx.saved_tensors
        need_x, need_w, need_scales, need_a, need_b, _ = ctx.needs_input_grad
        sizes, dx, dw, dscales, da, db = ctx.sizes, None, None, None, None, None
        if need_x or need_scales or need_a:
            dlow = empty_rows(sizes, low.shape[1], dy)
            for dy_g, dlow_g, b_g in per_group(sizes, (dy, dlow), (b.mT,)):
                torch.mm(dy_g, b_g, out=dlow_g)
            dscales = low * dlow if need_scales else None
            dlow.mul_(scales)
        if need_x:
            dx = empty_rows(sizes, x.shape[1], dy)
            for dy_g, dlow_g, dx_g, w_g, a_g in per_group(sizes, (dy, dlow, dx), (w.mT, a)):
                torch.mm(dy_g, w_g, out=dx_g)
                dx_g.addmm_(dlow_g, a_g)
        if need_w:
            dw = weight_gradient(sizes, x, dy, w)
        if need_a:
            da = weight_gradient(sizes, dlow, x, a).permute(1, 2, 0)
        if need_b:
            db = weight_gradient(sizes, low * scales, dy, b).permute(2, 1, 0)
        return dx, dw, dscales, da, db, None
