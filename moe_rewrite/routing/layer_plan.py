"""The plan of a model whose layers route: which experts are on, and what each layer made of its rows.

Shapes: D width of a layer's rows, E active experts; `...` the rows' dimensions in that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..kernels.plan.op import largest, route
from .carve_rule import CarveRule
from .dispatch import RowGates, Watch
from .plan import RoutingPlan

SMALL = 1e-20  # added to the sum of sigmoid scores, as in GLM-4-MoE


@dataclass(frozen=True)
class GateRule:
    """How logits (..., E) become gates, in float32.

    top_k: experts a row; None: all.
    normalized: divide the gates of the experts taken by their sum (norm_topk_prob).
    score: ``"softmax"`` or ``"sigmoid"`` of the logits, before the top k.
    """

    top_k: int | None
    normalized: bool
    score: str

    shared: ClassVar[int] = 0  # outputs that every row has

    def among(self, active: Sequence[int]) -> GateRule:
        """The rule where these experts are on."""
        return self

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(..., E) of rows x and the experts' rows of the router, (E, D)."""
        if self.score == "sigmoid":  # in float32, as in GLM-4-MoE
            x = _wide(x)
        return F.linear(x, weight.to(x.dtype))

    def gates(self, logits: torch.Tensor, spare: int = 0) -> tuple[torch.Tensor, int]:
        """(gates, zero for experts that a row does not go to; k).

        spare: columns of minus infinity to take the top k over, so that k columns exist for any
        number of experts.
        """
        wide, count = _wide(logits), logits.shape[-1]
        if spare:
            none = wide.new_full((*wide.shape[:-1], spare), float("-inf"))
            wide = torch.cat([wide, none], dim=-1)
        k = min(self.top_k or wide.shape[-1], wide.shape[-1])
        if self.score == "softmax" and k == wide.shape[-1]:
            gates = wide.softmax(-1)
        elif self.score == "softmax":
            taken, experts = route(wide, k, normalize=self.normalized)
            gates = taken.new_zeros(wide.shape).scatter(-1, experts, taken)
        else:
            scores = wide.sigmoid()
            experts = largest(scores, k)
            taken = scores.gather(-1, experts)
            if self.normalized:
                taken = taken / (taken.sum(-1, keepdim=True) + SMALL)
            gates = torch.zeros_like(scores).scatter(-1, experts, taken)
        return gates[..., :count], k


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class LayerView:
    """What a layer gets of the plan.

    active: indices of the experts that are on; without any the dense region runs.
    rule: how its logits become gates.
    logits: those to use instead of its own router's; None: its own.
    fixed: gates of the active experts, which every row has; None: the rule's.
    spare: as for `GateRule.gates`.
    watch: without active experts, is shown the rows; see `Watch`.
    """

    active: tuple[int, ...]
    rule: GateRule | CarveRule
    logits: torch.Tensor | None = None
    fixed: tuple[float, ...] | None = None
    spare: int = 0
    watch: Callable[..., None] | None = None


def layer_logits(
    view: LayerView, x: torch.Tensor, rows: Sequence[torch.Tensor] | torch.Tensor, channels: int
) -> torch.Tensor | None:
    """Target of a layer's router: (..., E) logits of its rows; None without active experts.

    x: the region's input (..., D), or a map whose features are dimension `channels`.
    rows: of each active expert, (D,), or with a bias (D + 1,); or all in one tensor.
    """
    if not view.active:
        return None
    if view.logits is not None:
        return view.logits
    x = x.movedim(channels, -1)
    weight = rows if isinstance(rows, torch.Tensor) else torch.stack(list(rows))
    return view.rule.logits(x, weight)


def layer_gates(view: LayerView, logits: torch.Tensor | None) -> RowGates | Watch | None:
    """Target of a node: the gates of a layer's rows; None or a Watch runs the dense region."""
    if view.watch is not None:
        return Watch(view.watch)
    if logits is None:
        return None
    if view.fixed is not None:
        given = _wide(logits).new_tensor(view.fixed).expand(logits.shape).contiguous()
        return RowGates(given, len(view.fixed), base=False)
    gates, k = view.rule.gates(logits, view.spare)
    return RowGates(gates, k, base=False)


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one call. Unlike a RoutingPlan it is complete only after the call: each layer
    routes its own rows.

    active: indices of the active experts, in order.
    num_experts: number of all experts, inactive ones included.
    rule: how logits become gates.
    fixed, spare: see LayerView.
    watch: without active experts, called with (name of a layer, *arguments of `Watch.show`).
    logits: of each layer that ran, (..., E), by the name of its region; a region that runs twice
        has a number after its name.
    """

    active: tuple[int, ...]
    num_experts: int
    rule: GateRule | CarveRule
    fixed: tuple[float, ...] | None = None
    spare: int = 0
    watch: Callable[..., None] | None = None
    logits: Mapping[str, torch.Tensor] = field(default_factory=dict)

    base: ClassVar[None] = None  # the frozen model is no expert
    patch_ids: ClassVar[None] = None

    def after(self, logits: Mapping[str, torch.Tensor | None]) -> LayerPlan:
        """The plan with the logits that the layers of a call computed."""
        return replace(self, logits={n: x for n, x in logits.items() if x is not None})

    @cached_property
    def _view(self) -> LayerView:
        return LayerView(self.active, self.rule, None, self.fixed, self.spare)

    def view(self, layer: str) -> LayerView:
        """Layers without given logits get one object, so that alike ones are exported once."""
        if self.watch is not None:
            return replace(self._view, watch=partial(self.watch, layer))
        given = self.logits.get(layer)
        return self._view if given is None else replace(self._view, logits=given)

    @property
    def layers(self) -> dict[str, RoutingPlan]:
        """The plan of each layer by the name of its region, with gates, logits and losses."""
        return {name: self._of_layer(logits) for name, logits in self.logits.items()}

    def _of_layer(self, logits: torch.Tensor) -> RoutingPlan:
        gates = layer_gates(LayerView(self.active, self.rule, fixed=self.fixed), logits)
        assert isinstance(gates, RowGates)
        return RoutingPlan(
            self.active, gates.gates, None, self.num_experts, tuple(logits.shape[:-1]),
            top_k=gates.top_k, logits=_wide(logits), score=self.rule.score, shared=self.rule.shared,
        )  # fmt: skip

    def load_balance_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of the layers' losses, see `RoutingPlan.load_balance_loss`."""
        return self._mean([p.load_balance_loss(mask) for p in self.layers.values()])

    def z_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of the layers' losses, see `RoutingPlan.z_loss`."""
        return self._mean([p.z_loss(mask) for p in self.layers.values()])

    def _mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        if not losses:
            raise InputError("no layer routed in this call: no expert was on")
        return torch.stack(losses).mean()

    def __getattr__(self, name: str) -> object:
        if name in ("gates", "weights", "selected", "rows"):
            raise AttributeError(
                f"plan.{name}: every layer of this model has a router of its own; see "
                f"plan.layers[name].{name}, where plan.layers has {', '.join(self.logits) or 'none'}"
            )
        raise AttributeError(f"LayerPlan has no attribute {name!r}")
