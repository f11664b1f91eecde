"""The options of `convert` that make what a folder of a standard class holds.

Imports transformers, so it is imported only when it is asked for.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import nn

from ...config import FFNExperts, TokenRouter
from ...errors import CheckpointError
from ...frontend.standard import folder as folders
from ...frontend.standard import names
from ...frontend.standard.formats import SIGMOID
from ...frontend.standard.tensors import shared_of


def recipe_of(folder: str | os.PathLike, dense: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder, and the options of `convert` for what it is. dense: the configuration
    of the dense model."""
    model = folders.read(folder)
    config: Any = model.config
    _require_plain(config, folder)
    normalized = getattr(config, "norm_topk_prob", True)
    routers = [n for n, m in model.named_modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    regions = [name.rpartition(".")[0] for name in routers]
    score = "sigmoid" if config.model_type in SIGMOID else "softmax"
    router = TokenRouter(
        top_k=config.num_experts_per_tok, base=False, normalize=False, init=0.5,
        gate="selected" if normalized else "all",
    )  # fmt: skip
    hidden = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    whole = getattr(dense, "intermediate_size", hidden)
    state, blocks = model.state_dict(), [names.block_of(model, region) for region in regions]
    experts = FFNExperts(
        sites=tuple(regions), router="layer", score=score,  # type: ignore[arg-type]
        granularity=1 if whole % hidden else whole // hidden,
        shared=_shared_form(state, blocks, whole, folder),
    )  # fmt: skip
    count = len(state[blocks[0].rows])
    split = regions[0].rpartition(".")[0]
    return model, {
        "mode": "upcycle", "split": split, "router": router, "experts": experts,
        "num_experts": count,
    }  # fmt: skip


def _require_plain(config: Any, folder: str | os.PathLike) -> None:
    """Raises CheckpointError for options of routers that no converted model has."""
    for name in ("routed_scaling_factor", "n_group"):
        if getattr(config, name, 1) != 1:
            raise CheckpointError(
                f"{folder}: {name}={getattr(config, name)}, expected 1, which converted models have"
            )


def _shared_form(
    state: dict[str, torch.Tensor], blocks: list[names.Block], whole: int,
    folder: str | os.PathLike,
) -> Literal["plain", "sigmoid"] | None:  # fmt: skip
    """Of the shared experts. Raises CheckpointError for another width than the dense model's."""
    found = [of for block in blocks if (of := shared_of(state, block.rest)) is not None]
    for width, _ in found:
        if width != whole:
            raise CheckpointError(
                f"{folder}: has a shared expert of width {width}, expected {whole}, the dense "
                "model's: that of a carved model is saved and loaded by save_pretrained() and load()"
            )
    return None if not found else "sigmoid" if found[0][1] else "plain"
