"""Sums over the processes that divide a model's weights (tensor parallel), with their gradients.

What all processes have alike is called whole; what each computes from its part of a weight, a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function


def summed_over(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of a tensor over the processes of the group of this name, the same in each."""
    if x.is_meta:
        return torch.empty_like(x)
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


class Copied(Function):
    """A whole tensor that each process goes on to use with its part of a weight: its gradient is the
    sum of the processes'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return summed_over(gradient, ctx.group), None


class Summed(Function):
    """The sum over the processes of what each computed with its part of a weight. It is whole, and
    so is its gradient. by_element: for `frontend.own_gradients`, which knows no collectives."""

    by_element = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return summed_over(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient, None
