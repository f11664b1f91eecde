"""Temporary replacements of the router's plan, or of the features at the cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..routing.plan import Planner, RoutingPlan
from ..routing.router import Router


class PlanOverride:
    """What a call uses instead of its own router and features.

    planner: makes the plans; None: the router does.
    features: used as those at the cut; None: the shallow segment computes them.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.planner: Planner | None = None
        self.features: torch.Tensor | None = None

    def dense(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        """The planner that leaves every expert out: the dense model."""
        return self.router.without_experts(features), None

    def everything(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        """The planner in which the frozen region takes every patch."""
        return self.router.everything(features), None

    def plan(self, plan: RoutingPlan) -> Planner:
        return lambda features, mask: (plan, None)

    def one_expert(self, index: int) -> Planner:
        """Every row goes to one expert with gate 1. Raises ConfigError for a PatchRouter."""
        self.router.require_rows("use_expert")
        return lambda features, mask: (self.router.one_expert(features, index), None)

    def of_fresh_experts(self, by: str) -> AbstractContextManager[None]:
        """Plan so that untrained experts give the dense model's output. by: `ExpertKind.fresh`."""
        if by == "as routed":
            return nullcontext()
        return self.planning_by(self.everything if by == "everything" else self.dense)

    @contextmanager
    def planning_by(self, planner: Planner) -> Iterator[None]:
        before, self.planner = self.planner, planner
        try:
            yield
        finally:
            self.planner = before

    @contextmanager
    def given_features(self, features: torch.Tensor) -> Iterator[None]:
        before, self.features = self.features, features
        try:
            yield
        finally:
            self.features = before
