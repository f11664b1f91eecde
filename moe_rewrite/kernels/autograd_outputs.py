"""Tensors that an op returns to autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def changeable(out: torch.Tensor) -> torch.Tensor:
    """An op's output that may be changed in place: autograd forbids that for views, and a product
    with a bias returns one."""
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


def empty_gradients(given: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    """For a trace: empty, contiguous gradients of those that need one."""
    return [t.new_empty(t.shape) for t, need in zip(given, needs, strict=True) if need]
