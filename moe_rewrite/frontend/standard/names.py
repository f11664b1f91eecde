"""Names of tensors in dense models and in mixtures of experts.

Those of experts come from transformers' own conversion of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

HALVES = ("gate_proj", "up_proj")  # of one product in models that fuse them
FUSED = "gate_up_proj"


def layer_of(region: str) -> int | None:
    """The number of a region's layer; None if its name has none."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", region)
    return int(numbers[-1]) if numbers else None


def beside(regions: Iterable[str], layers: int) -> tuple[str, ...]:
    """The places in other layers where these regions would be."""
    found = {re.sub(r"\.\d+(?=\.|$)", "#", r): r for r in regions}
    every = (re.sub(r"\.\d+(?=\.|$)", f".{i}", r) for r in found.values() for i in range(layers))
    return tuple(e for e in every if e not in regions)


def sources(name: str, dense: Container[str]) -> tuple[str, ...]:
    """The dense model's tensor for one of the class: its own, or the one that it is half of."""
    if name in dense:
        return (name,)
    parts = name.split(".")
    for half in HALVES:
        if half in parts:
            whole = ".".join(FUSED if p == half else p for p in parts)
            return (whole,) if whole in dense else ()
    return ()


def half_of(name: str, source: str) -> int | None:
    """Which half of its source a tensor is; None for all of it."""
    if name == source:
        return None
    return next(i for i, half in enumerate(HALVES) if half in name.split("."))


def by_kind(found: Iterable[str]) -> list[str]:
    """Names without the numbers of layers, each once."""
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in found))


@dataclass(frozen=True)
class Block:
    """Names of the tensors of a mixture-of-experts block.

    first: (E, 2 H, D), gate above up. down: (E, D, H). rows: (E, D) of the router.
    rest: the others: of a shared expert and its gate, a bias for the choice of experts.
    """

    first: str
    down: str
    rows: str
    rest: tuple[str, ...]


def block_of(model: nn.Module, region: str) -> Block:
    """The names in the block that stands where `region` was."""
    keys = [k for k in model.state_dict() if k.startswith(f"{region}.")]
    merged: dict[int, str] = {}  # tensors of an expert that one of the class holds -> its name
    for converter in get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]
        if isinstance(converter, WeightConverter):
            (target,) = converter.target_patterns
            found = [k for k in keys if k.endswith(target)]
            merged |= {len(converter.source_patterns): k for k in found}
    routers = [n for n, m in model.named_modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    rows = next(f"{n}.weight" for n in routers if n.startswith(f"{region}."))
    rest = tuple(k for k in keys if k not in (merged[2], merged[1], rows))
    return Block(merged[2], merged[1], rows, rest)
