"""Single LoRA experts in the files of PEFT's adapters: adapter_config.json and
adapter_model.safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, ConfigError
from ...utils.atomic_files import replace_file, write_json
from ...utils.read_files import parse_tensors, read_bytes, read_json, require_finite
from ..base import ExpertParameters
from .parameters import LoRAParameters
from .peft_config import AdapterConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def lora_sites(sites: Iterable[ExpertParameters]) -> dict[str, LoRAParameters]:
    """The sites with LoRA experts, by module name. Raises ConfigError for other experts."""
    found: Any = {s.site.name: s for s in sites if s.as_adapter}
    if not found:
        raise ConfigError("PEFT's format holds LoRA experts: this model's are of another kind")
    return found


def _require_alike(sites: dict[str, LoRAParameters], names: Iterable[str]) -> None:
    """Raises ConfigError where PEFT would compute something else with the same tensors."""
    for name in names:
        if name in sites and sites[name].site.unlike_peft:
            raise ConfigError(
                f"{name} is {sites[name].site.unlike_peft}: convert with LoRAExperts(sites=[...]) "
                "without it to exchange experts with PEFT"
            )


def write_adapter(
    sites: dict[str, LoRAParameters], spec: Any, expert: int, base: str | None,
    folder: str | os.PathLike,
) -> None:  # fmt: skip
    """Write an expert as an adapter that computes the same as the expert with gate 1.

    base: name or path of the model that it belongs to, if known.
    """
    from safetensors.torch import save

    _require_alike(sites, sites)
    tensors = {}
    for name, site in sites.items():
        for part, weight in (("A", site.a[expert]), ("B", site.b[expert])):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = weight.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": None, "r": spec.rank, "lora_alpha": spec.alpha,
        "target_modules": sorted(sites), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": any(s.site.transposed for s in sites.values()),
        "base_model_name_or_path": base,
        "inference_mode": True,
    }  # fmt: skip
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    replace_file(target / WEIGHTS, save(tensors))
    write_json(target / CONFIG, config)


def read_adapter(
    sites: dict[str, LoRAParameters], spec: Any, folder: str | os.PathLike
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Site -> (A, B) of an adapter, converted to the experts' rank and scale.

    A smaller rank is padded with zeros. Raises CheckpointError for another kind of adapter, fields
    that experts cannot do, a larger rank, modules that are not sites, or other shapes, and
    ConfigError for convolutions on which PEFT does something else.
    """
    config, given = _read(Path(folder), sites)
    _require_alike(sites, given)
    made = {}
    for name, parts in given.items():
        a, b, rank = parts.get("A"), parts.get("B"), config.rank_of(name)
        if rank > spec.rank:
            raise CheckpointError(
                f"{folder}: {name} has rank {rank}, and this model's experts have {spec.rank}: "
                f"convert with LoRAExperts(rank={config.largest_rank})"
            )
        want_a, want_b = sites[name].a[0], sites[name].b[0]
        fits = (
            a is not None and b is not None
            and a.shape == (rank, *want_a.shape[1:])
            and b.shape == (want_b.shape[0], rank, *want_b.shape[2:])
        )  # fmt: skip
        if not fits:
            raise CheckpointError(
                f"{folder}: {name} has A and B of {[None if t is None else tuple(t.shape) for t in (a, b)]}, "
                f"expected rank {rank} of {tuple(want_a.shape)} and {tuple(want_b.shape)}"
            )
        assert a is not None and b is not None
        scale = config.scale_of(name) / spec.scale
        full_a, full_b = torch.zeros_like(want_a), torch.zeros_like(want_b)
        full_a[:rank], full_b[:, :rank] = a.to(want_a), b.to(want_b) * scale
        if not (full_a.isfinite().all() and full_b.isfinite().all()):
            raise CheckpointError(
                f"{folder}: {name} with scale {scale:g} is too large for {want_b.dtype}: cast the "
                "model to a dtype of a wider range before it is converted"
            )
        made[name] = full_a, full_b
    return made


@torch.no_grad()
def fill_newest(sites: dict[str, LoRAParameters], read: dict[str, Any]) -> None:
    """Copy what `read_adapter` returned into the newest expert."""
    for name, (a, b) in read.items():
        sites[name].a[-1].copy_(a)
        sites[name].b[-1].copy_(b)


def _read(
    folder: Path, sites: dict[str, LoRAParameters]
) -> tuple[AdapterConfig, dict[str, dict[str, torch.Tensor]]]:
    """The configuration, and A and B by site."""
    config = AdapterConfig.of(str(folder), read_json(folder / CONFIG))
    tensors = parse_tensors(read_bytes(folder / WEIGHTS), str(folder / WEIGHTS))
    require_finite(tensors, str(folder))
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no tensors, expected those of an adapter")
    given: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if part not in ("A", "B") or name not in sites:
            raise CheckpointError(
                f"{folder}: {key} belongs to no LoRA site of this model; its sites are "
                f"{', '.join(sorted(sites)[:4])}, ..."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {key} is of {tensor.dtype}, expected real numbers")
        if given.setdefault(name, {}).setdefault(part, tensor) is not tensor:
            raise CheckpointError(f"{folder}: {key} is there twice, with and without {PREFIX!r}")
    return config, given
