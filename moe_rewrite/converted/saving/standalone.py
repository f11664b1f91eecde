"""A converted model as a folder that transformers reads with a modelling file of its own.

Imports transformers, so it is imported only when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ...config import LoRAExperts, TokenRouter
from ...errors import ConversionError, EquivalenceError
from ...frontend.example_inputs import random_arguments
from ...frontend.standalone import classes
from ...frontend.standard import folder as folders
from ...ir.equivalence import TOLERANCE, evaluating
from ...routing.ridge_gate import AnalyticGate
from .seen_in_call import lora_sites, observed

WHAT = "save_pretrained(standalone=True)"
LENGTHS = (1, 9, 33)  # of the calls that are compared


def save(
    moe: Any, folder: str | os.PathLike, max_shard_size: int | str, tokenizer: Any, verify: bool
) -> None:
    """See `MoEModel.save_pretrained`."""
    _require_holdable(moe)
    dense = moe._host_module()
    with evaluating(moe), torch.no_grad():
        moe._experts.require_known()
        facts = _facts(moe)
        text = classes.file_text(dense)
        with classes.imported(text) as module:
            config = getattr(module, classes.CONFIG).from_dict(_plain(dense.config))
            config.moe_rewrite, config.auto_map = facts, classes.auto_map(dense)
            kind = getattr(module, f"Routed{type(dense).__name__}")
            with torch.device("meta"):
                model = kind(config).to(moe.dtype)  # which the configuration then says

            def check(fresh: Path) -> None:
                _require_same(moe, _read(kind, fresh))

            state = _state(moe, model)
            _require_known(set(state), set(model.state_dict()), dense)
            folders.write(
                folder, model, state, dense, tokenizer, max_shard_size,
                check if verify else None, {classes.FILE: text},
            )  # fmt: skip


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's options without what belongs to its class or folder."""
    own = ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version")
    return {k: v for k, v in config.to_dict().items() if k not in own}


def _require_known(made: set[str], there: set[str], dense: nn.Module) -> None:
    """Raises ConversionError unless a model has the tensors of its class, no others."""
    if odd := sorted(made ^ there):
        raise ConversionError(
            f"{WHAT}: {odd[0]} is {'no tensor' if odd[0] in made else 'a tensor'} of "
            f"{type(dense).__name__} as transformers makes it, unlike here: convert the model as it "
            "was loaded, without adapters or other modules in it"
        )


def _read(kind: Any, folder: Path) -> nn.Module:
    with folders.quiet():
        return kind.from_pretrained(folder, dtype="auto").eval()


# -- what can be held -------------------------------------------------------------------------------


def _require_holdable(moe: Any) -> None:
    """Raises ConversionError or ConfigError for what the modelling file does not compute."""
    moe._store.require_plain(WHAT)
    moe._store.require_whole(WHAT)
    spec, experts, dense = moe.router.spec, moe.recipe.experts, moe.host.module
    refuse = _refusal(moe, spec, experts, dense)
    if refuse:
        raise ConversionError(f"{WHAT}: {refuse}")


def _refusal(moe: Any, spec: Any, experts: Any, dense: nn.Module) -> str:
    """Why a model cannot be held; empty if it can."""
    config: Any = getattr(dense, "config", None)
    if not hasattr(config, "model_type"):
        return f"{type(dense).__name__} is no model of transformers, whose classes read the folder"
    if not isinstance(experts, LoRAExperts):
        way = "; an upcycled language model is written by save_standard(folder)"
        return f"it holds LoRAExperts, this model has {type(experts).__name__}{way}"
    if not isinstance(spec, TokenRouter):
        return (
            f"it holds a TokenRouter, this model has a {type(spec).__name__}, whose experts choose"
        )
    if spec.policy == "expert":
        return (
            "TokenRouter(policy='expert') chooses among all rows of a batch, which it does not hold"
        )
    if config.is_encoder_decoder:
        return f"{type(dense).__name__} is an encoder-decoder, of whose caches there are two"
    if added := columns_added(moe):
        return added
    if not moe.router.active_indices():
        return "every expert is off, so the dense model says it all: activate() one"
    return ""


def columns_added(moe: Any) -> str:
    """Why experts do not stand alone if some added columns to a head; empty if none did."""
    added = [s for s in moe.expert_sites() if sum(getattr(s, "classes", ()))]
    name = added[0].site.name.removesuffix(".columns") if added else ""
    return name and f"experts added columns to {name}"


def _facts(moe: Any) -> dict[str, Any]:
    """What the modelling file reads of the configuration."""
    place, argument, layouts = observed(moe, WHAT)
    dense, router = moe._host_module(), moe.router
    prefix = "" if dense.base_model is dense else f"{dense.base_model_prefix}."
    if not place.startswith(prefix):
        raise ConversionError(
            f"{WHAT}: the cut, at {place}, is not in the base model {prefix[:-1]}"
        )
    return {
        "experts": [moe.names[e] for e in router.active_indices()],
        "rank": moe.recipe.experts.rank, "scale": moe.recipe.experts.scale,
        "place": place.removeprefix(prefix), "argument": argument,
        "gate": gate_facts(router),
        "whole": _whole(dense, place, prefix),
        "width": len(router.lift) if isinstance(router, AnalyticGate) else router.size - 1,
        "sites": {n.removeprefix(prefix): v for n, v in layouts.items() if n.startswith(prefix)},
        "sites_of_head": {n: v for n, v in layouts.items() if not n.startswith(prefix)},
    }  # fmt: skip


def gate_facts(router: Any) -> dict[str, Any]:
    """What the modelling file's Gate reads."""
    spec, analytic = router.spec, isinstance(router, AnalyticGate)
    knows_base = analytic and router.knows_base
    return {
        "granularity": spec.granularity, "top_k": spec.top_k, "over_all": spec.gate == "all",
        "base": spec.base, "normalize": spec.normalize,
        "prior": spec.sharpness * spec.prior if spec.base and knows_base else 0.0,
        "projection": spec.projection if analytic else 0,
    }  # fmt: skip


def _whole(dense: Any, place: str, prefix: str) -> str:
    """The module that runs all layers, whose arguments are a call's mask and cache: the innermost
    model around the place."""
    parts = place.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts))]
    models = [n for n in around if isinstance(dense.get_submodule(n), PreTrainedModel)]
    return max(models[-1], prefix[:-1], key=len).removeprefix(prefix[:-1]).removeprefix(".")


# -- what is written --------------------------------------------------------------------------------


def _state(moe: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model that is written."""
    dense = moe._store.tensors(moe._store.persistent_tensors())
    dense |= {a: dense[n] for a, n in moe._store.aliases.items() if n in dense}
    maps = {
        n
        for n, m in model.named_modules()
        if isinstance(getattr(m, "plan", None), object) and hasattr(m, "low_rank")
    }
    state: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        owner, _, leaf = name.rpartition(".")
        state[f"{owner}.base.{leaf}" if owner in maps else name] = tensor.detach()
    active = list(moe.router.active_indices())
    for name, site in lora_sites(moe).items():
        with torch.no_grad():
            down, up = site.stacked(active)
        state[f"{name}.low_rank.down.weight"] = down.detach()
        state[f"{name}.low_rank.up.weight"] = up.detach()
    gate = next(n for n, _ in model.named_modules() if n.split(".")[-1] == "gate_of_experts")
    for part, tensor in gate_tensors(moe.router, active).items():
        state[f"{gate}.{part}"] = tensor.detach().clone().contiguous()
    return {k: t.contiguous() for k, t in state.items()}


def gate_tensors(router: Any, active: list[int]) -> dict[str, torch.Tensor]:
    """Of an analytic gate, the rows times its sharpness."""
    rows, more = router.stacked(tuple(active)), {}
    frozen = torch.zeros_like(rows[0])
    if isinstance(router, AnalyticGate):
        frozen, more = router.frozen, {"lift": router.lift}
    if router.spec.base:
        rows = torch.cat([frozen.unsqueeze(0), rows])
    if more:
        rows = rows * router.spec.sharpness
    return {"weight": rows[:, :-1], "bias": rows[:, -1], **more}


# -- the proof --------------------------------------------------------------------------------------


def _calls(moe: Any) -> Iterator[dict[str, Any]]:
    """Arguments: of several lengths, and padded on either side."""
    usual = moe.host.arguments(None)
    if "input_ids" not in usual:
        yield random_arguments(usual, moe.host.vocabulary())
        return
    most = getattr(moe.config, "max_position_embeddings", None) or LENGTHS[-1]
    for length in sorted({min(n, most) for n in LENGTHS}):
        like = {
            k: v.new_zeros(2, length) if isinstance(v, torch.Tensor) and v.ndim == 2 else v
            for k, v in usual.items()
        }
        made = random_arguments(like, moe.host.vocabulary())
        yield made
        if "attention_mask" in made and length > 1:
            for side in (slice(0, length // 3), slice(-(length // 3), None)):
                mask = made["attention_mask"].clone()
                mask[1, side] = 0
                yield made | {"attention_mask": mask}


def _require_same(moe: Any, model: nn.Module) -> None:
    """Compare the outputs of both. Raises EquivalenceError."""
    model.to(moe.device)
    for given in _calls(moe):
        pairs = zip(_compared(moe, given), _compared(model, given), strict=True)
        for ours, theirs in pairs:
            error = float((ours - theirs).abs().max())
            allowed = TOLERANCE[ours.dtype] * max(1.0, float(ours.abs().max()))
            if not error <= allowed:
                shapes = ", ".join(
                    str(tuple(v.shape)) for v in given.values() if hasattr(v, "shape")
                )
                raise EquivalenceError(
                    f"{WHAT}: on {shapes} what was written differs by {error:.2e}, allowed "
                    f"{allowed:.0e}: nothing was written; please report this model"
                )


def _compared(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of a call, at positions that are not padding."""
    mask = given.get("attention_mask")
    leaves = [t for t in pytree.tree_leaves(dict(model(**given))) if isinstance(t, torch.Tensor)]
    kept = [t for t in leaves if t.is_floating_point()]
    if mask is None:
        return kept
    return [t[mask != 0] if t.shape[:2] == mask.shape else t for t in kept]
