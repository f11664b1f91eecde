"""What an op hands back to autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def changeable(out: torch.Tensor) -> torch.Tensor:
    """An op's output that a graph may change in place: autograd forbids it for views, and a
    product with a bias is one."""
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


def empty_gradients(given: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    """Those that are needed, in contiguous memory, for a trace."""
    return [t.new_empty(t.shape) for t, need in zip(given, needs, strict=True) if need]
