"""Temporary replacements of the router's plan, or of the features at the cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..routing.plan import Planner, RoutingPlan
from ..routing.router import Router


@dataclass(frozen=True, eq=False)
class _Replacement:
    """What one context replaces of one model."""

    owner: PlanOverride
    planner: Planner | None = None
    features: torch.Tensor | None = None


# those in force, of every model, oldest first. Each thread and each task has its own; contexts that
# overlap may end in any order.
_in_force: ContextVar[tuple[_Replacement, ...]] = ContextVar("replacements", default=())


class PlanOverride:
    """What a call uses instead of its own router and features, in this thread or task."""

    def __init__(self, router: Router) -> None:
        self.router = router

    @property
    def planner(self) -> Planner | None:
        """Makes the plans; None: the router does."""
        found = (r.planner for r in reversed(_in_force.get()) if r.owner is self and r.planner)
        return next(found, None)

    @property
    def features(self) -> torch.Tensor | None:
        """Used as those at the cut; None: the shallow segment computes them."""
        of_this = (r.features for r in reversed(_in_force.get()) if r.owner is self)
        return next((f for f in of_this if f is not None), None)

    def dense(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        """The planner that leaves every expert out: the dense model."""
        return self.router.without_experts(features), None

    def everything(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        """The planner in which the frozen region takes every patch."""
        return self.router.everything(features), None

    def plan(self, plan: RoutingPlan) -> Planner:
        return lambda features, mask: (plan, None)

    def fixed_gates(self, gates: dict[int, float], what: str) -> Planner:
        """Every row goes to these experts with these gates. Raises ConfigError for a PatchRouter."""
        self.router.require_rows(what)
        return lambda features, mask: (self.router.fixed_gates(features, gates), None)

    def of_fresh_experts(self, by: str) -> AbstractContextManager[None]:
        """Plan so that untrained experts give the dense model's output. by: `ExpertKind.fresh`."""
        if by == "as routed":
            return nullcontext()
        return self.planning_by(self.everything if by == "everything" else self.dense)

    def planning_by(self, planner: Planner) -> AbstractContextManager[None]:
        return _replacing(_Replacement(self, planner=planner))

    def given_features(self, features: torch.Tensor) -> AbstractContextManager[None]:
        return _replacing(_Replacement(self, features=features))


@contextmanager
def _replacing(replacement: _Replacement) -> Iterator[None]:
    _in_force.set((*_in_force.get(), replacement))
    try:
        yield
    finally:
        _in_force.set(tuple(r for r in _in_force.get() if r is not replacement))
