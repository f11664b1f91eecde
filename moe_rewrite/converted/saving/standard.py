"""A converted model as a checkpoint of transformers' own mixture-of-experts classes, and back.

Imports transformers, so it is imported only when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config import FFNExperts, require
from ...errors import CheckpointError, ConversionError, EquivalenceError
from ...experts.carved import CarvedExperts
from ...experts.copies import CopiedParameters
from ...experts.ffn.call import FeedForwardCall
from ...experts.ffn.routed_copies import RoutedCopies
from ...frontend.standard import folder as folders
from ...frontend.standard.formats import BASES, FORMATS, Fit, Wanted, fit
from ...frontend.standard.tensors import RegionTensors, class_state, fill, interleaved
from ...ir.equivalence import evaluating
from ..low_precision import require_not_quantized

LENGTHS = (1, 9, 33)  # of the calls that are compared
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit; of others:
COARSE = 3e-2


def save(
    moe: Any, folder: str | os.PathLike, format: str, max_shard_size: int | str,
    tokenizer: Any, verify: bool,
) -> str:  # fmt: skip
    """See `MoEModel.save_standard`; returns the format."""
    require(
        format in ("auto", *FORMATS), "format", format, f"'auto' or one of {', '.join(FORMATS)}"
    )
    _require_layers(moe)
    regions = region_tensors(moe)
    wanted = _wanted(moe, regions)
    _require_widths(wanted, moe.host.module.dtype)
    chosen = _chosen(wanted, format)
    state = class_state(wanted, chosen.model, regions)

    def check(written: Path) -> None:
        _require_same(moe, folders.read(written), f"save_standard(format={chosen.format!r})")

    base = moe.host.module
    folders.write(
        folder, chosen.model, state, base, tokenizer, max_shard_size, check if verify else None
    )
    return chosen.format


def restore(moe: Any, read: nn.Module, folder: str | os.PathLike, verify: bool) -> None:
    """Write the tensors of a folder's model into a model that was converted by `recipe_of`."""
    regions = region_tensors(moe)
    moe._store.copy_on_write(*_dense_names(moe))
    wanted = _wanted(moe, regions)
    config: Any = read.config
    there = fit(wanted, config.model_type)
    if there.refusals:
        raise CheckpointError(f"{folder}: is not of this dense model: {'; '.join(there.refusals)}")
    shapes, state = (
        {k: t.shape for k, t in m.state_dict().items()} for m in (there.model, read)
    )  # fmt: skip
    odd = sorted(k for k in shapes | state if shapes.get(k) != state.get(k))
    if odd:
        raise CheckpointError(
            f"{folder}: is not of this dense model: {odd[0]} is {state.get(odd[0])} there, "
            f"{shapes.get(odd[0])} here"
        )
    fill(wanted, read, read.state_dict(), regions)
    moe.trained[:] = [True] * moe.num_experts
    if verify:
        _require_same(moe, read, f"from_standard({str(folder)!r})")


# -- what a converted model has ---------------------------------------------------------------------


def _require_layers(moe: Any) -> None:
    """Raises ConversionError for what no class holds, whatever its format."""
    experts, kind = moe.recipe.experts, type(moe.recipe.experts).__name__
    require_not_quantized(moe.expert_sites(), "save_standard()")
    way = "convert with mode='upcycle', whose feed-forwards have a router each"
    if isinstance(experts, CarvedExperts):
        _require_gates_of_classes(experts)
    elif not isinstance(experts, FFNExperts):
        raise ConversionError(f"save_standard: no class has {kind}; {way}")
    if not experts.by_layer:
        raise ConversionError(
            f"save_standard: every class has a router a layer, this model one at the cut; {way}"
        )
    config: Any = getattr(moe.host.module, "config", None)
    if (
        getattr(config, "model_type", None) not in BASES
        or moe.host.module.get_output_embeddings() is None
    ):
        raise ConversionError(
            f"save_standard: {type(moe.host.module).__name__} is no language model of "
            f"{', '.join(BASES)}, whose layers transformers' mixtures of experts have"
        )
    off = [moe.names[e] for e in range(moe.num_experts) if e not in moe.router.active_indices()]
    if off:
        raise ConversionError(
            f"save_standard: experts {', '.join(off)} are off, which no class can say: activate() "
            "or remove() them"
        )


def _require_gates_of_classes(experts: CarvedExperts) -> None:
    """Raises ConversionError for carved experts that have other gates in every class."""
    chosen, way = experts.taken - experts.shared, experts.taken - 1
    said = ""
    if chosen != 1:
        said = f"the gates of {chosen} chosen experts sum to one in every class, here each is 1"
    elif experts.bias:
        said = "no class adds a bias to its router's logits"
    if said:
        raise ConversionError(
            f"save_standard: {said}. Shared experts and one chosen expert fit, without a bias: "
            f"CarvedExperts({experts.experts}, shared={way}, active={experts.active:g}, bias=False)"
        )


def _require_widths(wanted: Wanted, dtype: torch.dtype) -> None:
    """Raises ConversionError for widths that transformers' grouped products do not take."""
    for name, width in (("hidden width", wanted.hidden), ("width", wanted.config.hidden_size)):
        if width * dtype.itemsize % 16:
            raise ConversionError(
                f"save_standard: a {name} of {width} in {dtype} is {width * dtype.itemsize} bytes; "
                "transformers multiplies the rows of experts only where these are a multiple of 16: "
                "take fewer and wider experts"
            )


def _wanted(moe: Any, regions: dict[str, RegionTensors]) -> Wanted:
    host = moe.host.module
    first = next(iter(regions.values()))
    return Wanted(
        config=host.config,  # type: ignore[arg-type]
        dense=_dense(moe), regions=tuple(regions),
        interleaved=interleaved(host), hidden=len(first.up[0]), **_routing(moe),
    )  # fmt: skip


def _routing(moe: Any) -> dict[str, Any]:
    spec, experts, count = moe.router.spec, moe.recipe.experts, moe.num_experts
    if isinstance(experts, CarvedExperts):
        shared = experts.shared
        return {
            "experts": count - shared, "top_k": 1, "normalized": True, "score": "any", "shared": shared,
        }  # fmt: skip
    return {
        "experts": count, "top_k": min(spec.top_k or count, count), "normalized": spec.sums_to_one,
        "score": experts.score, "shared": experts.granularity if experts.shared else 0,
        "shared_gate": experts.shared == "sigmoid",
    }  # fmt: skip


def _dense_names(moe: Any) -> list[str]:
    """Of the dense tensors that a state dict has and no expert replaces."""
    replaced = {w for site in moe.expert_sites() for w in site.replaced}
    return [name for name in moe._store.persistent_tensors() if name not in replaced]


def _dense(moe: Any) -> dict[str, torch.Tensor]:
    """These tensors, tied ones under each of their names."""
    found = moe._store.tensors(_dense_names(moe))
    return found | {a: found[n] for a, n in moe._store.aliases.items() if n in found}


def region_tensors(moe: Any) -> dict[str, RegionTensors]:
    """The experts of each region by their parts in a gated feed-forward, as views of the parameters.
    Raises ConversionError for a region of another form."""
    arguments, _ = moe.normalized((), moe.host.arguments(None))
    graph, _ = moe.graph_for(arguments)
    sites = {site.site.name: site for site in moe.expert_sites()}
    found: dict[str, RegionTensors] = {}
    for _, bound in graph.steps:
        code = bound.step.code.module.graph
        owned = dict(zip(code.find_nodes(op="placeholder"), bound.step.owned, strict=False))
        for node in code.nodes:
            if isinstance(node.target, FeedForwardCall):
                _, _, _, given, *_ = node.args
                parts = [None if n is None else owned[n][1].rpartition(":") for n in given]
                name = next(p[0] for p in parts if p is not None)
                own = [None if p is None else p[2] for p in parts]
                site = sites[name]
                assert isinstance(site, RoutedCopies)
                made = _by_role(node.target, site, site, own, list(site.rows))
                if isinstance(moe.recipe.experts, CarvedExperts):
                    made = _apart(made, moe.recipe.experts.shared)
                elif site.shared is not None:
                    gate = [] if site.shared.gate is None else [site.shared.gate]
                    beside = _by_role(node.target, site, site.shared, own, gate)
                    made = replace(made, shared=beside)
                found[name] = made
    return found


def _apart(of: RegionTensors, shared: int) -> RegionTensors:
    """The same, with the first experts as shared ones."""
    if not shared:
        return of
    first = RegionTensors(of.gate[:shared], of.up[:shared], of.down[:shared], [])
    return RegionTensors(
        of.gate[shared:], of.up[shared:], of.down[shared:], of.rows[shared:], first
    )  # fmt: skip


def _by_role(
    call: FeedForwardCall, site: RoutedCopies, copies: CopiedParameters, parts: list[str | None],
    rows: Sequence[torch.Tensor],
) -> RegionTensors:  # fmt: skip
    """copies: of the site, its own or its shared expert's."""
    weights = [p.name for p in site.site.parts if p.kind == "weight"]
    of_part = dict(zip(weights, copies.parameter_lists(), strict=True))
    lists: Any = tuple(None if part is None else of_part.get(part) for part in parts)
    form = call.lowered(None)
    name = site.site.name
    if form.form is None or form.form.gate is None or any(own is None for own in lists):
        raise ConversionError(
            f"save_standard: {name} is no gated feed-forward down(act(gate x) * up x), which every "
            "class has"
        )
    up, down, gate, *biases = form.parts(form.by_expert(False, lists, lists))
    if any(b is not None for b in (*biases, call.bias_once)):
        raise ConversionError(
            f"save_standard: {name} has biases, which no class has in its experts"
        )
    return RegionTensors(gate, up, down, rows)


# -- which class ------------------------------------------------------------------------------------


def _chosen(wanted: Wanted, format: str) -> Fit:
    """The class asked for, or the first that fits. Raises ConversionError with every reason."""
    fits = {name: fit(wanted, name) for name in FORMATS}
    if format == "auto":
        able = next((f for f in fits.values() if not f.refusals), None)
        if able is not None:
            return able
        said = "; ".join(f"{f.format}: {', '.join(f.refusals)}" for f in _nearest(fits))
        raise ConversionError(
            f"save_standard: no class holds this model, the nearest first: {said}"
        )
    if not fits[format].refusals:
        return fits[format]
    near = next(f for f in _nearest(fits) if f.format != format)
    lacks = f", but: {', '.join(near.refusals)}" if near.refusals else ", which holds this model"
    raise ConversionError(
        f"save_standard(format={format!r}) cannot hold this model: {', '.join(fits[format].refusals)}. "
        f"Nearest: format={near.format!r}{lacks}"
    )


def _nearest(fits: dict[str, Fit]) -> list[Fit]:
    return sorted(fits.values(), key=lambda f: len(f.refusals))


# -- the proof --------------------------------------------------------------------------------------


@torch.no_grad()
def _require_same(moe: Any, model: nn.Module, what: str) -> None:
    """Compare the logits of both. Raises EquivalenceError."""
    model.to(moe.device)
    generator = torch.Generator().manual_seed(0)
    size, most = moe.host.vocabulary(), moe.config.max_position_embeddings
    usual = moe.host.arguments(None)  # for which there is a graph
    with evaluating(moe):
        for length in sorted({min(n, most) for n in LENGTHS}):
            ids = torch.randint(size, (2, length), generator=generator).to(moe.device)
            given = usual | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ours, theirs = moe(**given).logits, model.eval()(**given).logits
            error = float((ours - theirs).abs().max())
            allowed = TOLERANCE.get(ours.dtype, COARSE) * max(1.0, float(ours.abs().max()))
            if not error <= allowed:
                raise EquivalenceError(
                    f"{what}: on {length} tokens {type(model).__name__} differs by {error:.2e}, allowed "
                    f"{allowed:.0e}: nothing was written; please report this model"
                )
