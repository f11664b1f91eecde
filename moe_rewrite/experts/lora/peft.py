"""Single LoRA experts in the files of PEFT's adapters: adapter_config.json and
adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, ConfigError
from ...utils.atomic_files import replace_file, write_json
from ..base import ExpertParameters
from .parameters import LoRAParameters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
REFUSED = (
    "use_dora",
    "alora_invocation_tokens",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


def lora_sites(sites: Iterable[ExpertParameters]) -> dict[str, LoRAParameters]:
    """The sites with LoRA experts, by module name. Raises ConfigError for other experts."""
    found: Any = {s.site.name: s for s in sites if s.as_adapter}
    if not found:
        raise ConfigError("PEFT's format holds LoRA experts: this model's are of another kind")
    return found


def write_adapter(
    sites: dict[str, LoRAParameters], spec: Any, expert: int, base: str | None,
    folder: str | os.PathLike,
) -> None:  # fmt: skip
    """Write an expert as an adapter that computes the same as the expert with gate 1.

    base: name or path of the model that it belongs to, if known.
    """
    from safetensors.torch import save

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

    A smaller rank is padded with zeros. Raises CheckpointError for another kind of adapter, a
    larger rank, modules that are not sites, or other shapes.
    """
    config, tensors = _read(Path(folder))
    rank, scale = _rank_and_scale(Path(folder), config, spec)
    given: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if part not in ("A", "B") or name not in sites:
            raise CheckpointError(
                f"{folder}: {key} belongs to no LoRA site of this model; its sites are "
                f"{', '.join(sorted(sites)[:4])}, ..."
            )
        given.setdefault(name, {})[part] = tensor
    made = {}
    for name, parts in given.items():
        a, b = parts.get("A"), parts.get("B")
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
        full_a, full_b = torch.zeros_like(want_a), torch.zeros_like(want_b)
        full_a[:rank], full_b[:, :rank] = a.to(want_a), b.to(want_b) * (scale / spec.scale)
        made[name] = full_a, full_b
    return made


@torch.no_grad()
def fill_newest(sites: dict[str, LoRAParameters], read: dict[str, Any]) -> None:
    """Copy what `read_adapter` returned into the newest expert."""
    for name, (a, b) in read.items():
        sites[name].a[-1].copy_(a)
        sites[name].b[-1].copy_(b)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: no adapter of PEFT's can be read ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{folder}: an adapter of type {kind!r}, expected 'LORA'")
    for option in REFUSED:
        if config.get(option):
            raise CheckpointError(f"{folder}: {option}={config[option]!r}: experts cannot do this")
    return config, tensors


def _rank_and_scale(folder: Path, config: dict[str, Any], spec: Any) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise CheckpointError(f"{folder}: r={rank!r}, lora_alpha={alpha!r} are no rank and scale")
    if rank > spec.rank:
        raise CheckpointError(
            f"{folder}: rank {rank}, and this model's experts have {spec.rank}: convert with "
            f"LoRAExperts(rank={rank})"
        )
    return rank, alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
