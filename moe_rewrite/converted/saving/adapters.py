"""A converted model as PEFT adapters and a router that chooses one for a prompt.

Imports transformers, so it is imported only when it is asked for.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_of
from torch import nn

from ...config import LoRAExperts, TokenRouter
from ...errors import ConfigError, ConversionError, EquivalenceError
from ...experts.lora import peft
from ...frontend.example_inputs import random_arguments
from ...frontend.standard import folder as folders
from ...frontend.weights import shallow_model
from ...ir.equivalence import TOLERANCE, evaluating
from ...routing.ridge_gate import AnalyticGate
from ...serve import facts as serving
from ...serve.router import AdapterRouter
from ...utils.atomic_files import replace_file, write_json
from ...utils.folders import require_writable
from ...utils.one_writer import one_writer
from .seen_in_call import observed
from .standalone import columns_added, gate_facts, gate_tensors

WHAT = "save_adapters"
LENGTHS = (1, 9, 33)  # of the prompts that are compared


def save(moe: Any, folder: str | os.PathLike, tokenizer: Any, verify: bool) -> None:
    """See `MoEModel.save_adapters`."""
    target = Path(folder)
    _require_holdable(moe)
    _require_own(target)
    with evaluating(moe), torch.no_grad():
        moe._experts.require_known()
        require_writable(target.parent)
        with tempfile.TemporaryDirectory(prefix=".moe_rewrite-", dir=target.parent) as made:
            fresh = Path(made) / "fresh"
            _write(moe, fresh, tokenizer)
            if verify:
                _require_same(moe, fresh)
            _replace(fresh, target, Path(made) / "old")


# -- what can be held -------------------------------------------------------------------------------


def _require_holdable(moe: Any) -> None:
    """Raises ConversionError or ConfigError for what adapters and a router at the cut cannot do."""
    moe._store.require_plain(WHAT)
    moe._store.require_whole(WHAT)
    refusal = _refusal(moe, moe.router.spec, moe.recipe.experts) or _refusal_of_base(moe)
    if refusal:
        raise ConversionError(f"{WHAT}: {refusal}")
    for name in _names(moe):
        if not serving.is_folder_name(name):
            raise ConfigError(
                f"{WHAT}: expert {name!r}: its folder and the engine's requests have its name, so "
                "expected letters, digits, '_', '-' and '.', other than 'base' and 'router': "
                f"moe.rename({name!r}, ...)"
            )


def _refusal(moe: Any, spec: Any, experts: Any) -> str:
    """Why experts or router cannot be held; empty if they can."""
    if not isinstance(experts, LoRAExperts):
        return f"adapters are LoRAExperts, this model has {type(experts).__name__}"
    if not isinstance(spec, TokenRouter):
        return f"it chooses by a TokenRouter, this model has a {type(spec).__name__}"
    if spec.policy == "expert":
        return "TokenRouter(policy='expert') chooses among all rows of a batch, not for a prompt"
    if spec.granularity == "token":
        return (
            "TokenRouter(granularity='token') gives every token experts of its own, and an engine "
            "takes adapters by the request: convert with granularity='prefix' or 'sequence'"
        )
    if added := columns_added(moe):
        return added
    if not moe.router.active_indices():
        return "every expert is off, so there is nothing to choose: activate() one"
    return ""


def _refusal_of_base(moe: Any) -> str:
    dense = moe.host.module
    config: Any = getattr(dense, "config", None)
    name = type(dense).__name__
    if not hasattr(config, "model_type") or not type(dense).__module__.startswith("transformers."):
        return f"{name} is no class of transformers, which reads the folder"
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder, whose prompt and answer are of two halves"
    if getattr(dense, "main_input_name", "") != "input_ids":
        return f"{name} takes {dense.main_input_name}, expected a model of token ids"
    if not moe.recipe.freeze:
        return (
            "the dense weights are trained too (freeze=False), and adapters belong to the original "
            "ones: save_pretrained(standalone=True) holds both"
        )
    return ""


def _names(moe: Any) -> list[str]:
    return [moe.names[e] for e in moe.router.active_indices()]


# -- what is written --------------------------------------------------------------------------------


def _write(moe: Any, fresh: Path, tokenizer: Any) -> None:
    place, argument, _ = observed(moe, WHAT)
    dense, router = moe._host_module(), moe.router
    folder = fresh / serving.ROUTER
    folder.mkdir(parents=True)
    for name in _names(moe):
        moe.export_peft(name, fresh / name)
    base = getattr(dense.config, "_name_or_path", None) or None
    width = len(router.lift) if isinstance(router, AnalyticGate) else router.size - 1
    facts = serving.Facts(
        _names(moe), base, type(dense).__name__, place, argument, width,
        str(moe.dtype).removeprefix("torch."), gate_facts(router),
    )  # fmt: skip
    gate = gate_tensors(router, list(router.active_indices()))
    replace_file(folder / serving.GATE, bytes_of(_plain(gate)))
    replace_file(folder / serving.SHALLOW, bytes_of(_plain(_shallow(moe, place))))
    dense.config.save_pretrained(folder)
    known = tokenizer if tokenizer is not None else folders.tokenizer_of(dense)
    if known is not None:
        known.save_pretrained(folder)
    write_json(folder / serving.FACTS, facts.to_json())


def _shallow(moe: Any, place: str) -> dict[str, torch.Tensor]:
    copy: nn.Module = moe.host.working_copy().module.eval()
    usual = random_arguments(moe.host.arguments(None), moe.host.vocabulary())
    return shallow_model.tensors_before(copy, place, {"input_ids": usual["input_ids"]})


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Own, contiguous tensors: safetensors holds no two that share memory."""
    return {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}


def _require_own(target: Path) -> None:
    """Raises ConfigError for a folder that replacing would take something else from."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: is no folder; choose another")
    ours = (target / serving.ROUTER / serving.FACTS).exists()
    if any(target.iterdir()) and not ours:
        raise ConfigError(
            f"{target}: holds files of something else, and {WHAT} replaces the folder as a whole: "
            "choose a new or an empty one"
        )


def _replace(fresh: Path, target: Path, old: Path) -> None:
    with one_writer(target.parent):
        _require_own(target)
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)


# -- the proof --------------------------------------------------------------------------------------


def _require_same(moe: Any, fresh: Path) -> None:
    """Compare what was written with the converted model: the adapters' tensors are read as any
    adapter is; features at the cut, and the gates of these. Raises EquivalenceError."""
    sites = peft.lora_sites(moe.expert_sites())
    for name in _names(moe):
        peft.read_adapter(sites, moe.recipe.experts, fresh / name)
    router = AdapterRouter.load(fresh)
    most = getattr(moe.config, "max_position_embeddings", None) or LENGTHS[-1]
    draw = torch.Generator().manual_seed(0)
    for length in sorted({min(n, most) for n in LENGTHS}):
        ids = torch.randint(1, max(moe.host.vocabulary(), 2), (1, length), generator=draw)
        given = {"input_ids": ids.to(moe.device)}
        features = moe.features(**given).cpu()
        _compare("features at the cut", router.features(ids), features, TOLERANCE[features.dtype])
        gates = _wanted(moe, given)
        _compare("gates", router.gates(features)[:, -1], gates, TOLERANCE[torch.float32])


def _wanted(moe: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1, [1 +] E) gates of a prompt, of the experts that are on."""
    plan = moe.route(**given)
    gates = plan.weights if plan.base is None else torch.cat([plan.base, plan.weights], -1)
    return gates[:, -1].cpu()


def _compare(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = float((ours - theirs).abs().max())
    allowed = tolerance * max(1.0, float(theirs.abs().max()))
    if not error <= allowed:
        raise EquivalenceError(
            f"{WHAT}: the {what} of what was written differ by {error:.2e}, allowed {allowed:.0e}: "
            "nothing was written; please report this model"
        )
