"""Who makes the routing plan of a call: the router, or something in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import RegionExperts
from ..errors import ConfigError
from ..passes.pipeline import Compiler
from ..routing.patch_gate import PatchGate
from ..routing.plan import Planner, RoutingPlan
from ..routing.router import Router
from ..routing.token_gate import TokenGate


class Planning(nn.Module):
    """A model with a router whose plans can be replaced for a while."""

    router: Router
    _compiler: Compiler
    _forced: Planner | None = None  # in the place of the router's plans
    _given: torch.Tensor | None = None  # in the place of the features at the cut

    def _index(self, name: str | int) -> int:
        raise NotImplementedError

    def _plan_dense(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        return self.router.without_experts(features), None

    @contextmanager
    def disable_experts(self) -> Iterator[None]:
        """Compute what the dense model computes, as PEFT's disable_adapter does."""
        with self._planning_by(self._plan_dense):
            yield

    @contextmanager
    def dense_plan(self) -> Iterator[None]:
        """Route so that experts fresh from a conversion give the dense model's output: at LoRA
        sites and with gates that sum to one as ever; where a region is replaced, the frozen one
        takes every patch (the whole map, if patches are isolated or experts narrower)."""
        experts = self._compiler.recipe.experts
        if self._compiler.equals_dense:
            yield
        else:
            comparable = isinstance(experts, RegionExperts) and experts.halo and experts.width == 1
            with self._planning_by(self._plan_everything if comparable else self._plan_dense):
                yield

    def _plan_everything(self, features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
        assert isinstance(self.router, PatchGate)
        return self.router.everything(features), None

    @contextmanager
    def use_plan(self, plan: RoutingPlan) -> Iterator[None]:
        """Route by this plan, as `route` gave it for as many samples, instead of the router's."""
        with self._planning_by(lambda features, mask: (plan, None)):
            yield

    @contextmanager
    def use_expert(self, name: str | int) -> Iterator[None]:
        """Route every row to one expert with gate 1, as if its task were known; it need not be on.

        Raises ConfigError where patches choose: an expert then takes the patches it prefers.
        """
        router, index = self.router, self._index(name)
        if not isinstance(router, TokenGate):
            raise ConfigError("use_expert: a PatchRouter's experts choose patches; use activate()")
        with self._planning_by(lambda features, mask: (router.one_expert(features, index), None)):
            yield

    @contextmanager
    def use_features(self, features: torch.Tensor) -> Iterator[None]:
        """Take these for what the shallow segment gives at the cut, as `features` gave them for the
        same samples: the shallow blocks are not run."""
        before, self._given = self._given, features
        try:
            yield
        finally:
            self._given = before

    @contextmanager
    def _planning_by(self, planner: Planner) -> Iterator[None]:
        before, self._forced = self._forced, planner
        try:
            yield
        finally:
            self._forced = before
