"""A choice as the request that an engine takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .facts import BASE

ENGINES = ("vllm", "sglang", "llama.cpp")
MIXES = ("llama.cpp",)  # run several adapters in one request


def require_engine(engine: str, mixture: bool = False) -> None:
    """Raises ConfigError for an engine that is not known, or takes one adapter a request where a
    mixture is asked for."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    if mixture and engine not in MIXES:
        raise ConfigError(
            f"mixture with engine={engine!r}: it takes one adapter a request; only "
            f"{', '.join(MIXES)} takes several"
        )


def requested(
    body: Mapping[str, Any], weights: Mapping[str, float], engine: str, base: str,
    names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """An OpenAI request that asks an engine for adapters.

    body: the request as it came. weights: name -> gate, as `AdapterRouter.weights` gives; engines
    that take one adapter a request are asked for the largest. base: the frozen model's name at the
    engine. names: all adapters, for llama.cpp in the order of its ``--lora`` options.
    Raises ConfigError for an engine, or an adapter, that is not known.
    """
    require_engine(engine)
    unknown = sorted(set(weights) - {BASE, *names})
    if unknown:
        raise ConfigError(f"adapter {unknown[0]!r}: expected base or one of {list(names)}")
    if engine == "llama.cpp":
        # zeros are said: an empty list would leave the scales that the server was started with
        scales = [{"id": i, "scale": weights.get(name, 0.0)} for i, name in enumerate(names)]
        return {**body, "model": base, "lora": scales}
    chosen = max(weights, key=lambda name: weights[name])
    if chosen == BASE:
        return {**body, "model": base}
    return {**body, "model": f"{base}:{chosen}" if engine == "sglang" else chosen}


def lora_request(name: str, names: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """The arguments of vLLM's ``LoRARequest`` for a choice; None for the frozen model.

    names: all adapters; each has its place among them, from 1, as its id. Raises ConfigError for
    an unknown name.
    """
    if name == BASE:
        return None
    if name not in names:
        raise ConfigError(f"adapter {name!r}: expected base or one of {list(names)}")
    path = str(Path(folder) / name)
    return {"lora_name": name, "lora_int_id": list(names).index(name) + 1, "lora_path": path}
