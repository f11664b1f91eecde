"""Carve a converted model's feed-forwards: show them calibration tokens, group their hidden units,
fit their routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..config import require
from ..errors import ConfigError, InputError, require_package
from ..experts.carved import CarvedExperts
from ..experts.ffn import carved_units
from ..experts.ffn.carved_units import CarvedUnits
from ..passes.kinds import kind_of
from ..passes.lower import ONE_BY_ONE, LowerFeedForward
from ..routing.layer_router import LayerRouter
from ..routing.packed_rows import RowMask
from ..routing.token_gate import counted_rows

TEXTS, LENGTH = 128, 64  # of those that a model writes itself
ROWS = 8192  # of a region that are kept, of those that it reads first


@dataclass
class Seen:
    """What one region computes with: it as a function, its dense weights, its rows so far."""

    body: Any
    dense: tuple[torch.Tensor, ...]
    rows: list[torch.Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, rows_TD: torch.Tensor) -> None:
        kept = rows_TD[: ROWS - self.count]
        if len(kept):
            self.rows.append(kept.detach().clone())
            self.count += len(kept)


def carve(moe: Any) -> None:
    """Divide the hidden units of every carved region among its experts, and fit its router. Without
    effect on other models, and on the meta device, where there is nothing to see.

    Raises ConfigError where there are no calibration batches and the model writes no texts, or
    where scipy is missing; InputError for batches that do not fit or show a region nothing.
    """
    spec, compiler = moe._compiler.recipe.experts, moe._compiler
    if not isinstance(spec, CarvedExperts):
        return
    if spec.calibration is not None:  # a model does not keep the batches alive
        compiler.recipe = replace(compiler.recipe, experts=replace(spec, calibration=None))
    if moe.device.type == "meta":
        return
    if spec.grouping == "coactivation":
        require_package("scipy", "carve", "CarvedExperts(grouping='coactivation')")
    sites = {site.site.name: site for site in moe.expert_sites() if isinstance(site, CarvedUnits)}
    seen = _watched(moe, _batches(moe, spec), sites)
    for name, site in sites.items():
        if name not in seen or not seen[name].count:
            raise InputError(
                f"CarvedExperts calibration: {name} read no row of these batches; pass batches "
                "that run all of the model"
            )
        of = seen.pop(name)
        order, rows = carved_units.fit(spec, torch.cat(of.rows), of.body, of.dense)
        site.carve(order, rows, moe._store.tensors(site.site.weights))


def set_active(moe: Any, share: float) -> None:
    """See `MoEModel.set_active`."""
    compiler, report = moe._compiler, moe._report
    require(
        isinstance(compiler.recipe.experts, CarvedExperts), "set_active", share,
        "a model of mode='carve'; activate() and deactivate() turn whole experts on and off",
    )  # fmt: skip
    experts = replace(compiler.recipe.experts, active=share)
    recipe = replace(compiler.recipe, experts=experts, router=experts.router)
    kind = kind_of(experts)
    compiler.recipe, moe.router.spec = recipe, experts.router
    moe.router.rule = kind.rule(recipe)
    sites = [s.site for s in moe.expert_sites() if isinstance(s, CarvedUnits)]
    report.experts = kind.words(recipe)
    report.macs_of = {s.name: kind.macs(s, recipe, experts.router) for s in sites}
    (lower,) = kind.lower(recipe, experts.router)
    assert isinstance(lower, LowerFeedForward)
    of_site = {s.name: lower.describe(s) for s in sites}
    report.lowered = [
        (name, how if how == ONE_BY_ONE else of_site[name]) for name, how in report.lowered
    ]


def _batches(moe: Any, spec: CarvedExperts) -> Iterable[Any]:
    given = spec.calibration
    if given is None:
        if not getattr(moe.host, "is_causal_lm", False):
            raise ConfigError(
                "CarvedExperts calibration=None: only a causal language model writes texts itself; "
                "pass a list of batches in the form of example_inputs, some thousand tokens in all"
            )
        return moe._own_texts(TEXTS, LENGTH, spec.seed)
    if isinstance(given, (torch.Tensor, Mapping)) or not isinstance(given, Iterable):
        raise InputError(
            f"CarvedExperts calibration={type(given).__name__}: this is one batch; pass a list of "
            "batches"
        )
    return given


@torch.no_grad()
def _watched(moe: Any, batches: Iterable[Any], sites: Mapping[str, CarvedUnits]) -> dict[str, Seen]:
    """What every region computes with when the dense model gets these batches, by site."""
    router = moe.router
    assert isinstance(router, LayerRouter)
    seen: dict[str, Seen] = {}

    def plan(features: torch.Tensor, mask: RowMask) -> tuple[Any, None]:
        counted = _counted(features, mask)

        def show(layer: str, rows: torch.Tensor, body: Any, dense: tuple) -> None:
            # a region that runs twice has a number after its name the second time
            site = layer if layer in sites else layer.rpartition(".")[0]
            flat = rows.reshape(-1, rows.shape[-1])
            if counted is not None and counted.numel() == len(flat):
                flat = flat[counted.flatten()]
            seen.setdefault(site, Seen(body, dense)).add(flat)

        return router.watched(show), None

    for batch in batches:
        here = pytree.tree_map_only(torch.Tensor, lambda t: t.to(moe.device), batch)
        arguments, _ = moe.bound((), moe.host.arguments(here), training=False)
        graph, leaves = moe.graph_for(arguments, training=False)
        graph.run(leaves, plan, False, None)
    return seen


def _counted(features: torch.Tensor, mask: RowMask) -> torch.Tensor | None:
    """(B, S) bool, the rows that count; None: all, or a mask of another form."""
    if mask is None or features.ndim != 3:
        return None
    try:
        return counted_rows(mask, features)
    except InputError:
        return None
