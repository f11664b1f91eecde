"""Experts whose weights lie off the device until a call uses them: in the host's memory, or in the
mapped file of a save."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from ..config import is_int, require
from ..errors import CheckpointError, ConfigError
from ..experts.base import ExpertParameters
from ..experts.head import HeadColumns
from .saving import checkpoint


def offload(moe: Any, keep: Any, folder: str | os.PathLike | None) -> None:
    """See `ExpertMethods.offload_experts`."""
    sites = [site for site in moe.expert_sites() if site.offloads]
    require(keep is None or is_int(keep) and keep >= 1, "keep", keep, "None or an int >= 1")
    if keep is None and folder is not None:
        raise ConfigError(
            f"keep=None, folder={str(folder)!r}: keep=None brings all experts back to the device; "
            "leave the folder out"
        )
    _require_possible(moe, sites)
    saved = {} if folder is None else _saved_weights(moe, sites, folder)
    moe._store.off_device.keep = keep
    for site in sites:
        if keep is None:
            site.bring_back()
        else:
            site.offload(keep, moe.device, saved)


def _require_possible(moe: Any, sites: list[ExpertParameters]) -> None:
    others = [s for s in moe.expert_sites() if not s.offloads and not isinstance(s, HeadColumns)]
    if others or not sites:
        router = " in layers that have routers of their own" if moe.router.by_layer else ""
        raise ConfigError(
            f"offload_experts() of {type(moe.recipe.experts).__name__}{router}: only LoRA and "
            "feed-forward experts under a router at the cut lie off the device"
        )
    if moe.device.type == "meta":
        raise ConfigError("offload_experts() on the meta device: experts have no values there")


def _saved_weights(
    moe: Any, sites: list[ExpertParameters], folder: str | os.PathLike
) -> dict[int, torch.Tensor]:
    """Mapped tensors by the id of the weight that they are to hold. Raises CheckpointError unless
    they have the same values."""
    mapped = checkpoint.mapped(folder)
    names = {id(p): name for name, p in moe.named_parameters()}
    found = {}
    for site in sites:
        for weight in site.weights():
            name = names[id(weight)]
            there = mapped.get(name)
            if there is None or there.dtype != weight.dtype or not _equal(there, weight):
                raise CheckpointError(
                    f"{folder}: its {name} is {'absent' if there is None else 'another'}, not this "
                    "model's: call moe.save_pretrained(folder) first"
                )
            found[id(weight)] = there
    return found


def _equal(there: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.equal(there, weight.detach().to(there.device))


def held(sites: Iterable[ExpertParameters]) -> dict[str, int]:
    """See `ExpertMethods.expert_bytes`."""
    found = {"device": 0, "memory": 0, "file": 0}
    for site in sites:
        residents = site.residents
        away = set() if residents is None else {id(p) for p in site.weights(trained=False)}
        for tensor in site.parameters():
            if residents is None or id(tensor) not in away:
                found["device"] += tensor.nbytes
            else:
                found["file" if residents.in_file(tensor) else "memory"] += tensor.nbytes
        found["device"] += 0 if residents is None else residents.held
    return found


def described(moe: Any) -> str:
    """Text for the report; empty where all experts lie on the device."""
    keep = moe.experts_offloaded
    if keep is None:
        return ""
    size = moe.expert_bytes()
    places = {"memory": "in memory", "file": "in a mapped file"}
    lie = [f"{size[of] / 1e6:.1f} MB {words}" for of, words in places.items() if size[of]]
    return (
        f"off {moe.device} until a call uses them: {' and '.join(lie) or 'none yet'}; there now: "
        f"{size['device'] / 1e6:.1f} MB, trained ones and copies of at most {keep} experts"
    )
