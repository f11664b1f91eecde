"""Fewer experts: two joined into one, and those removed that few rows go to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..config import is_number, require
from ..errors import ConfigError
from ..ir.equivalence import evaluating
from ..routing.statistics import RoutingStatistics


def join(moe: Any, first: int, second: int, weight: float) -> dict[str, float]:
    """See `ExpertMethods.join_experts`."""
    experts = moe._experts
    require(is_number(weight) and 0 <= weight <= 1, "weight", weight, "a number from 0 to 1")
    if first == second:
        raise ConfigError(f"join_experts({moe.names[first]!r}) with itself: expected two experts")
    untrained = [moe.names[e] for e in (first, second) if not moe.trained[e]]
    if untrained:
        raise ConfigError(f"join_experts: expert {untrained[0]!r} was not trained: remove it")
    pair, weights = (first, second), (1.0 - weight, weight)
    for site in experts.sites:
        if not site.as_adapter:
            site.join(pair, weights)  # which refuses, or has nothing to join
    moe.router.join(first, second)
    errors = {site.site.name: site.join(pair, weights) for site in experts.sites}
    experts.remove(second)
    experts.forget()
    return {name: error for name, error in errors.items() if error is not None}


def use_of(moe: Any, batches: Iterable[Any]) -> dict[str, float]:
    """See `ExpertMethods.expert_use`."""
    statistics = RoutingStatistics()
    with evaluating(moe), torch.no_grad():
        for batch in batches:
            here = pytree.tree_map_only(torch.Tensor, lambda t: t.to(moe.device), batch)
            arguments = moe.host.arguments(here)
            graph, _ = moe.graph_for(moe.bound((), arguments, False)[0], False)
            plan = moe.with_plan(**arguments)[1] if moe.router.by_layer else moe.route(**arguments)
            statistics.add(plan, arguments.get(graph.emitted.mask or ""))
    found = statistics.summary(moe.names)
    if not found:
        raise ConfigError("batches: no rows in these; pass inputs as for `example_inputs`")
    return {name: found[f"share/{name}"] for name in moe.names}


def prune(moe: Any, batches: Iterable[Any], below: float) -> dict[str, float]:
    """See `ExpertMethods.prune`."""
    require(is_number(below) and 0 < below <= 1, "below", below, "a number over 0, at most 1")
    use = use_of(moe, batches)
    gone = {name: share for name, share in use.items() if share < below}
    if len(gone) == len(use):
        raise ConfigError(
            f"prune(below={below}): every expert has a smaller share, the largest is "
            f"{max(use.values()):.2g}, and one has to stay"
        )
    if gone:
        moe._experts.remove(*gone)
    return gone
