"""Tensors that do not hold all their values: those of which each process has a part (DTensor, as
FSDP2's `fully_shard` makes them), and those of a trace by torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def is_traced(tensor: Any) -> bool:
    """Whether a trace put it in place of a tensor with values."""
    return hasattr(tensor, "fake_mode")


def without_shards(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; in place of a sharded one, one of the whole size that holds no memory."""
    return hollow(tensor) if is_sharded(tensor) else tensor


def hollow(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A plain tensor of the same size, strides and device that holds no memory; a parameter for a
    parameter. dtype: None: the same."""
    size, stride = tensor.shape, tensor.stride()
    empty = torch.empty_strided(size, stride, dtype=dtype or tensor.dtype, device=tensor.device)
    empty.untyped_storage().resize_(0)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def gathered(tensor: Any) -> Any:
    """All of a sharded tensor, which every process must ask for; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill_whole(tensor: Any, values: torch.Tensor) -> None:
    """Write a whole tensor's values, which every process has, into one that may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values.to(tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(values)
