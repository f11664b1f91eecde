"""The router of a model whose layers route: it says which experts are on, and nothing more.

The parameters of the layers' routers are with their experts (`experts.ffn.routed_copies`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import TokenRouter
from .carve_rule import CarveRule
from .layer_plan import GateRule, LayerPlan
from .packed_rows import RowMask
from .router import GivenRows, Router, without


class LayerRouter(Router):
    """Flags of the experts, without rows.

    before[e]: (e, 2), flags just before expert e was added.
    """

    by_row = by_layer = True

    def __init__(self, spec: TokenRouter, rule: GateRule | CarveRule, device: torch.device) -> None:
        super().__init__(spec, 0, device)
        self.rule = rule

    def __len__(self) -> int:
        return len(self.active)

    def needs_one(self) -> bool:
        return True

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        for _ in range(count):
            flags = torch.stack([self.active, self.pending], 1).to(self.device, torch.float32)
            self.before.append(nn.Parameter(flags, requires_grad=False))
            self.active = torch.cat([self.active, torch.tensor([active])])
            self.pending = torch.cat([self.pending, torch.tensor([not active])])
        return []

    def remove(self, index: int) -> None:
        keep = [e for e in range(len(self)) if e != index]
        self.before = without(self.before, index)
        self.active, self.pending = self.active[keep].clone(), self.pending[keep].clone()

    def remove_last(self) -> None:
        record = self.before[-1]
        self.before = self.before[:-1]
        if record.is_meta:
            self.active, self.pending = self.active[:-1], self.pending[:-1]
            return
        flags = record.bool().cpu()
        self.active, self.pending = flags[:, 0].clone(), flags[:, 1].clone()

    def forward(  # type: ignore[override]
        self, features: torch.Tensor, mask: RowMask, state: Any,
        given: GivenRows | None = None,
    ) -> tuple[LayerPlan, None]:  # fmt: skip
        active = self.active_indices() if given is None else given.active
        spare = (self.spec.top_k or 0) if given is not None and given.open else 0
        return LayerPlan(active, len(self), self.rule.among(active), spare=spare), None

    def without_experts(self, features: torch.Tensor) -> LayerPlan:  # type: ignore[override]
        return LayerPlan((), len(self), self.rule)

    def everything(self, features: torch.Tensor) -> LayerPlan:  # type: ignore[override]
        """The plan that gives every row to every expert with gate 1."""
        return self.fixed_gates(features, dict.fromkeys(range(len(self)), 1.0))

    def watched(self, show: Callable[..., None]) -> LayerPlan:
        """The plan of the dense model that shows what its regions compute with; see `Watch`."""
        return LayerPlan((), len(self), self.rule, watch=show)

    def fixed_gates(  # type: ignore[override]
        self, features: torch.Tensor, gates: dict[int, float]
    ) -> LayerPlan:
        """The plan that gives every row of every layer to these experts with these gates."""
        active = tuple(sorted(gates))
        fixed = tuple(gates[e] for e in active)
        return LayerPlan(active, len(self), self.rule, fixed=fixed)
