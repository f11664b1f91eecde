"""Tiny random models of every family of the installed transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .tiny_configs import shrunk

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "images": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def families() -> Iterator[tuple[str, str, type]]:
    """(task, name of the class, class)."""
    import transformers
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for task, table in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            name = names[0] if isinstance(names, (list, tuple)) else names
            found = getattr(transformers, name, None)
            if name not in seen and found is not None:
                seen.add(name)
                yield task, name, found


# sizes that some classes derive from others, or keep in tables of their own, and values that others
# need: tried one after the other until a model runs
TRIES: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}),
    ((), {"num_key_value_heads": 4, "head_dim": 8}),
    (("head_dim",), {}),
    (("head_dim", "num_key_value_heads"), {}),
    (("max_position_embeddings",), {}),
    (("head_dim", "num_key_value_heads", "num_attention_heads", "max_position_embeddings"), {}),
)


def build(kind: type, runs: Callable[[nn.Module], Any]) -> nn.Module:
    """A tiny model of a class, on which `runs` does not raise. Raises what the first try raised."""
    first: Exception | None = None
    for left_out, instead in TRIES:
        try:
            model = _build(kind, left_out, instead)
            runs(model)
        except (Exception, MemoryError) as error:
            first = first or error  # type: ignore[assignment]
            continue
        return model
    assert first is not None
    raise first


def _build(kind: type, left_out: tuple[str, ...], instead: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config: Any = kind.config_class  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(shrunk(config, left_out, instead, kind.__name__))
    for p in model.parameters():  # values that vanish would hide what is computed
        if p.is_floating_point() and p.ndim > 1:
            nn.init.normal_(p, std=(p.numel() / p.shape[0]) ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
    return model.eval()
