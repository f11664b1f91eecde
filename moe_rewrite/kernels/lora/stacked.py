"""A linear map and its LoRA experts in the fewest passes: PyTorch's products, and for many rows on
a GPU, the gradient of x with its low-rank part in the epilogue.

T rows (any leading dimensions), D input width, O output width, R ranks of all experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..triton import runs_on
from .reference import Stack

FUSED_WORK = 2**38  # multiplications
NARROW = 8  # columns, up to which a product with them as rows takes less time on a CPU


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    bias: bool
    scales: bool
    a: Sequence[bool]
    b: Sequence[bool]


def fuses(dy_TO: torch.Tensor, weight_OD: torch.Tensor) -> bool:
    """Whether the kernel is faster for the gradient of x: on an H200 in bf16 it is for 32,768 rows
    of width 4096 (1.30 times the linear map alone, instead of 1.35), not for fewer or narrower
    rows, nor in the forward pass, where weights are contiguous along the summed dimension
    (`benchmarks/results/gpu_lora.json`)."""
    large = len(dy_TO) * weight_OD.numel() >= FUSED_WORK
    return large and weight_OD.stride(-1) == 1 and dy_TO.itemsize == 2 and runs_on(dy_TO)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (T, O), low (T, R) = x A^T); low is empty if it is not saved."""
    if not save:
        y = product(x, weight, bias, scales, a, b)
        return y, y.new_empty(0)
    y, low = F.linear(x, weight, bias), F.linear(x.contiguous(), stack(a, 0))  # as `reference`
    y.view(-1, y.shape[-1]).addmm_(_rows(low * scales), stack(b, 1).t())
    return y, low


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a: Stack,
    b: Stack,
) -> torch.Tensor:
    """y alone. For one token these are few microseconds, so nothing is looked up twice."""
    y = F.linear(x, weight, bias)
    if not len(a):  # no expert is on
        return y
    low = F.linear(x.contiguous(), a if isinstance(a, torch.Tensor) else stack(a, 0)).mul_(scales)
    up = b if isinstance(b, torch.Tensor) else stack(b, 1)
    y_TO = y.view(-1, y.shape[-1])
    y_TO.addmm_(low.view(y_TO.shape[0], low.shape[-1]), up.t())
    return y


def rows_and_scales(x: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as a matrix (T, D), and its scales as one (T, R)."""
    if scales.shape[:-1] != x.shape[:-1]:
        scales = scales.expand(*x.shape[:-1], -1)
    # contiguous: as in `reference`
    return x.contiguous().flatten(0, -2), scales.flatten(0, -2)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    needs: Needs,
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order of `needs`."""
    made: list[torch.Tensor] = []
    dy_TO, x_TD = _rows(dy), _rows(x)
    dscales: list[torch.Tensor] = []
    if all_ranks := needs.x or needs.scales:
        dlow = low_gradient(dy_TO, stack(b, 1)).view_as(low)
        if needs.scales:
            dscales = [(low * dlow).sum_to_size(scales.shape)]
        dlow.mul_(scales)
    if needs.x:
        if fuses(dy_TO, weight):
            from . import launch

            dx = launch.low_rank(dy_TO, weight.t(), _rows(dlow), stack(a, 0).t())
        else:
            dx = torch.mm(dy_TO, weight).addmm_(_rows(dlow), stack(a, 0))
        made.append(dx.view(x.shape))
    if needs.weight:
        made.append(torch.mm(dy_TO.t(), x_TD))
    if needs.bias:
        made.append(dy_TO.sum(0))
    made += dscales
    bounds = list(pairwise(accumulate((len(t) for t in a), initial=0)))
    for (lo, hi), factor, need in zip(bounds, b, needs.a, strict=True):
        if need:
            if all_ranks:
                own = _rows(dlow)[:, lo:hi]
            else:
                own = low_gradient(dy_TO, factor).view_as(low[..., lo:hi])
                own = _rows(own * scales[..., lo:hi])
            made.append(torch.mm(own.t(), x_TD))
    for (lo, hi), need in zip(bounds, needs.b, strict=True):
        if need:
            made.append(up_gradient(dy_TO, _rows(low[..., lo:hi] * scales[..., lo:hi])))
    return made


def low_gradient(dy_TO: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """``dy B`` (T, R). Of few columns, a copy as rows: a CPU takes 0.2 to 0.7 of the time."""
    return torch.mm(dy_TO, b_OR.t().contiguous().t() if _narrow(b_OR) else b_OR)


def up_gradient(dy_TO: torch.Tensor, low_TR: torch.Tensor) -> torch.Tensor:
    """``dy^T low`` (O, R). Of few columns, its transpose: a CPU takes 0.1 to 0.4 of the time."""
    if _narrow(low_TR):
        return torch.mm(low_TR.t(), dy_TO).t().contiguous()
    return torch.mm(dy_TO.t(), low_TR)


def _narrow(columns: torch.Tensor) -> bool:
    return columns.device.type == "cpu" and columns.shape[1] <= NARROW


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def stack(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
