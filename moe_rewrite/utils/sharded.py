"""Tensors that do not hold all their values: those of which each process has a part (DTensor, as
FSDP2's `fully_shard` makes them, and what DeepSpeed's ZeRO stage 3 leaves: `zero_stage_3`), and those
of a trace by torch.export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .zero_stage_3 import fill_parted, is_parted_by_zero, require_filled, whole_size, whole_values


def is_sharded(tensor: Any) -> bool:
    """Whether each process keeps a part of it, though ZeRO stage 3 may have filled it just now."""
    return is_divided(tensor) or is_parted_by_zero(tensor)


def is_divided(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def is_traced(tensor: Any) -> bool:
    """Whether a trace put it in place of a tensor with values."""
    return hasattr(tensor, "fake_mode")


def in_process_group() -> bool:
    """Whether this process is one of several; without, nothing is sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def without_shards(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; in place of a sharded one, one of the whole size that holds no memory."""
    return hollow(tensor) if is_sharded(tensor) else tensor


def hollow(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A plain tensor of the same size, strides and device that holds no memory; a parameter for a
    parameter. dtype: None: the same."""
    like: dict[str, Any] = {"dtype": dtype or tensor.dtype, "device": tensor.device}
    if is_parted_by_zero(tensor):
        empty = torch.empty(whole_size(tensor), **like)
    else:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), **like)
    empty.untyped_storage().resize_(0)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def gathered(tensor: Any) -> Any:
    """All of a sharded tensor, which every process must ask for; others as they are."""
    if is_parted_by_zero(tensor):
        return whole_values(tensor)
    return tensor.full_tensor() if is_divided(tensor) else tensor


def own_part(tensor: Any) -> Any:
    """This process's part of a sharded tensor; others as they are."""
    return tensor.to_local() if is_divided(tensor) else tensor


@torch.no_grad()
def alike(tensors: Iterable[torch.Tensor], mesh: Any) -> None:
    """Give these tensors the values of the mesh's first process, in all of its processes."""
    group = mesh.get_group()
    for tensor in tensors:
        torch.distributed.broadcast(tensor.data, group=group, group_src=0)


@torch.no_grad()
def fill_whole(tensor: Any, values: torch.Tensor) -> None:
    """Write a whole tensor's values, which every process has, into one that may be sharded."""
    if is_parted_by_zero(tensor):
        fill_parted(tensor, values)
        return
    if is_divided(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values.to(tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(values)


def gathered_to_run(tensor: Any) -> Any:
    """All of a tensor that no engine has gathered for the module that runs: tied to one in another
    block, or sharded on its own. Its gradient is the mean over the processes, as FSDP2's is; each
    holds its part. Others as they are; ZeRO stage 3 must have filled what it divides."""
    if is_parted_by_zero(tensor):
        return require_filled(tensor)
    if not is_divided(tensor):
        return tensor
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor.full_tensor()
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    return tensor.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)


def is_engine(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it; between calls it may hold whole tensors."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@dataclass(frozen=True)
class Sharding:
    """How a model's tensors are divided: over which mesh, and how in each of its dimensions."""

    mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Sharding | None:
        """That of the first sharded tensor, along the first dimension; None if none is sharded."""
        first: Any = next(filter(is_divided, tensors), None)
        if first is None:
            return None
        from torch.distributed.tensor import Shard

        divided = (p if p.is_replicate() else Shard(0) for p in first.placements)
        return cls(first.device_mesh, tuple(divided))

    def divide(self, modules: Iterable[nn.Module], new: Sequence[nn.Parameter]) -> list[Any]:
        """Put a sharded parameter in place of each of these, with the values of the mesh's first
        process; every process must ask for it. Returns the sharded parameters."""
        from torch.distributed.tensor import distribute_tensor

        made = {
            id(p): nn.Parameter(
                distribute_tensor(p.detach(), self.mesh, self.placements), p.requires_grad
            )
            for p in new
        }
        for table in [m._parameters for module in modules for m in module.modules()]:
            table.update({k: made[id(p)] for k, p in table.items() if id(p) in made})
        return [made[id(p)] for p in new]


def require_known_to_ddp(trained: Iterable[nn.Parameter]) -> None:
    """Within a forward of DistributedDataParallel: raise ConfigError for parameters that are newer
    than it. It does not average their gradients, so each process would train its own."""
    if not in_process_group():
        return
    of_ddp: Any = torch.nn.parallel.DistributedDataParallel
    if of_ddp._active_ddp_module is None:
        return
    known = {id(p) for p in of_ddp._active_ddp_module._module_parameters}
    if any(id(p) not in known for p in trained):
        raise ConfigError(
            "experts were added after DistributedDataParallel(moe), which does not average their "
            "gradients over the processes: call expand() in all processes, then wrap the model "
            "again, DistributedDataParallel(moe), and make a new optimizer"
        )
