"""Tensor parallel: the dense weights divided by the plan of the base model.

The host's layers are replaced by ones that compute with a part (`frontend.divided_layers`), and
graphs are captured anew: they hold the sums over processes. What conversion added is whole in every
process, and so is what goes from block to block: all are given the same inputs, and give the same
outputs. Weights are DTensors, so that state dicts and saves know of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, EquivalenceError
from ..experts.head import HeadColumns
from ..experts.lora.parameters import LoRAParameters
from ..frontend.capture import TRACING
from ..frontend.example_inputs import random_arguments
from ..frontend.weights.divided_layers import FSDP, Part, planned, replace_layer, restore_layers
from ..frontend.weights.structural_copy import canonical_names
from ..ir.equivalence import compare
from ..utils.quantized import is_quantized
from ..utils.sharded import alike, in_process_group, own_part
from .saving.state_dict import added_tensors


def divide(moe: Any, mesh: Any) -> None:
    """See `MoEModel.tensor_parallel`."""
    _require_mesh(mesh, moe.device)
    _require_divisible(moe)
    with TRACING, _outputs_kept(moe):
        parts = _divided(moe, mesh)
    moe._compiler.parts = parts
    moe._graphs.clear()
    alike((tensor for _, tensor in added_tensors(moe)), mesh)
    moe.router.copied = True
    for block in (*moe.shallow, *moe.deep, moe._store.rest):
        block.run_on = own_part


def _require_mesh(mesh: Any, device: torch.device) -> None:
    world = torch.distributed.get_world_size() if in_process_group() else 0
    fits = in_process_group() and getattr(mesh, "ndim", 0) == 1 and mesh.size() == world
    if not fits or mesh.device_type != device.type:
        raise ConfigError(
            f"tensor_parallel({mesh}) of a model on {device} in {world} processes: expected a mesh "
            f"of one dimension over all of them, on the model's device: "
            f"init_device_mesh({device.type!r}, ({max(world, 1)},))"
        )


def _require_divisible(moe: Any) -> None:
    store = moe._store
    store.require_whole("tensor_parallel()")
    others = [n for n, s in store.sites.items() if not isinstance(s, LoRAParameters | HeadColumns)]
    if others:
        raise ConfigError(
            f"{others[0]} has experts that are not LoRA, and tensor_parallel divides no others: "
            f"divide this model by FSDP2, {FSDP}"
        )
    if store.off_device.keep is not None:
        raise ConfigError(
            "tensor_parallel() of a model whose experts lie off the device: call "
            "offload_experts(keep=None) first"
        )
    if not moe.recipe.freeze:
        raise ConfigError(
            "the dense weights of this model are trained (freeze=False), and tensor_parallel "
            f"divides frozen ones: divide it by FSDP2, {FSDP}"
        )


def _divided(moe: Any, mesh: Any) -> dict[str, Part]:
    """Put layers and parts of tensors in place; returns the parts."""
    store, host = moe._store, moe.host.module
    plan: Any = getattr(host, "_tp_plan", None)
    if not plan:
        raise ConfigError(
            f"{moe.host.name} has no tensor parallel plan (base_model_tp_plan of its config, "
            f"_tp_plan of its class): divide it by FSDP2, {FSDP}"
        )
    store.load_into(host)
    names = canonical_names(host)
    parts: dict[str, Part] = {}
    for of in planned(host, plan):
        for leaf, part in replace_layer(of, mesh).items():
            name = names[f"{of.name}.{leaf}"]
            if parts.setdefault(name, part) != part:
                raise ConfigError(
                    f"the plan divides {of.name}.{leaf} in two ways, since it is tied to {name}: "
                    f"untie them before convert(), or divide this model by FSDP2, {FSDP}"
                )
    for name, part in parts.items():
        slot = store.slots[name]
        if is_quantized(slot.get()):
            raise ConfigError(
                f"{name} is quantised, and tensor_parallel divides plain weights: divide this model "
                f"by FSDP2, {FSDP}"
            )
        slot.set(nn.Parameter(_own(slot.get(), part, mesh), requires_grad=False))
    store.tie()
    store.parallel = mesh
    return parts


def _own(tensor: torch.Tensor, part: Part, mesh: Any) -> Any:
    """A DTensor whose part has memory of its own."""
    from torch.distributed.tensor import DTensor, Shard

    own = tensor.detach().narrow(part.dim, part.start, part.stop - part.start)
    return DTensor.from_local(
        own.clone(memory_format=torch.contiguous_format), mesh, [Shard(part.dim)],
        run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


@contextmanager
def _outputs_kept(moe: Any) -> Iterator[None]:
    """What is divided within is put back if that raises, or if the model then computes something
    else, for which this raises EquivalenceError."""
    store, host = moe._store, moe.host
    whole = {name: slot.get() for name, slot in store.slots.items()}
    classes = {module: type(module) for module in host.module.modules()}
    arguments = random_arguments(host.arguments(None), host.vocabulary(), 2)
    arguments = {
        k: v.to(moe.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    try:
        before = moe.reference.outputs(arguments, "eval")
        yield
        report = compare(before, _outputs_of_parts(moe, arguments), arguments.get("attention_mask"))
        if not report.equal:
            raise EquivalenceError(
                f"{host.name} divided by its plan differs from the whole model by "
                f"{report.max_error:.2e}: please report this model; nothing was changed"
            )
    except BaseException:
        for name, tensor in whole.items():
            store.slots[name].set(tensor)
        store.tie()
        store.parallel = None
        restore_layers(classes)
        raise


def _outputs_of_parts(moe: Any, arguments: dict[str, Any]) -> list[Any]:
    try:
        return moe.reference.outputs(arguments, "eval")
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{moe.host.name} does not run with parts of its weights ({error}): numbers of heads, "
            "those of keys and values too, must be multiples of the number of processes"
        ) from error
