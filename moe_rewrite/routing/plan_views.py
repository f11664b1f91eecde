"""Views of a plan, which sites read: sites with the same layout share a view; and what a call runs of
a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..ir.gate_layout import GateLayout
from .dispatch import RowGates
from .layer_plan import LayerPlan, LayerView
from .plan import RoutingPlan


@dataclass(frozen=True)
class ScaledGates:
    """For stacked LoRA experts: each gate times alpha / rank, repeated over the rank.

    `of` returns (..., active * rank) in this dtype, or (B, active * rank, H, W) over a map.
    """

    layout: GateLayout
    dtype: torch.dtype
    rank: int
    scale: float

    def of(self, plan: RoutingPlan) -> torch.Tensor:
        scales = (plan.weights * self.scale).to(self.dtype)
        if scales.shape[-1] == 1:  # a view, of one expert
            scales = scales.expand(*scales.shape[:-1], self.rank)
        else:
            scales = scales.unsqueeze(-1).expand(*scales.shape, self.rank).flatten(-2)
        return self.layout.broadcast(scales, plan.rows, plan.grid)


@dataclass(frozen=True)
class SortedGates:
    """For experts that each run on their own rows. `of` returns RowGates, or None if no expert is
    active.

    base: include the frozen model's gate, if the router has one.
    """

    layout: GateLayout
    base: bool

    def of(self, plan: RoutingPlan) -> RowGates | None:
        if not plan.active:
            return None
        base = plan.base if self.base else None
        gates = plan.weights if base is None else torch.cat([base, plan.weights], dim=-1)
        shaped = self.layout.broadcast(gates, plan.rows, plan.grid)
        return RowGates(shaped, plan.top_k, base is not None)


@dataclass(frozen=True)
class WholePlan:
    """The plan itself, for a region."""

    def of(self, plan: RoutingPlan) -> RoutingPlan:
        return plan


@dataclass(frozen=True)
class ClassGates:
    """For a classification head: (B, 1 + E) log of each gate of a sample, the frozen model's first.

    None with a PatchRouter, or without a gate of the frozen model: classes are not weighted then.
    """

    of_all: ClassVar[bool] = True  # columns of experts that no row goes to are weighted too

    def of(self, plan: RoutingPlan) -> torch.Tensor | None:
        if plan.base is None or plan.patch_ids is not None:
            return None
        gates = torch.cat([plan.base, plan.weights], dim=-1)
        if gates.ndim == 3:
            gates = gates.mean(1)
        return gates.clamp_min(torch.finfo(gates.dtype).tiny).log()


@dataclass(frozen=True)
class LayerGates:
    """For a region with a router of its own. layer: its name in `LayerPlan.logits`."""

    layer: str

    def of(self, plan: LayerPlan) -> LayerView:
        return plan.view(self.layer)


PlanView = ScaledGates | SortedGates | WholePlan | ClassGates | LayerGates


def view_plan(plan: RoutingPlan | LayerPlan, view: PlanView) -> Any:
    """Target of a view's node. Emitting removes the node: a model makes each view once a call."""
    return view.of(plan)  # type: ignore[arg-type]


class Active(NamedTuple):
    """Experts of a call: those that are on, and those of them that run."""

    on: tuple[int, ...]
    run: tuple[int, ...]


@dataclass
class OffDevice:
    """Which experts' weights lie off the device until a call uses them; of one model.

    keep: how many of them have copies there between calls; None: all weights lie on the device.
    trained: indices of the experts that are trained, whose weights always do.
    """

    keep: int | None = None
    trained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Work:
    """What the deep half runs in a call.

    plan: as the router made it.
    taken: its experts that some row goes to, see `RoutingPlan.of_taken`.
    """

    plan: Any
    taken: Any

    @classmethod
    def of(cls, plan: RoutingPlan | LayerPlan, off: OffDevice, compiled: bool = False) -> Work:
        """compiled: what runs is compiled for any number of experts."""
        if not isinstance(plan, RoutingPlan) or compiled and off.keep is None:
            return cls(plan, plan)
        return cls(plan, plan.of_taken(off.keep is not None, off.trained))

    @property
    def active(self) -> Active:
        return Active(self.plan.active, self.taken.active)

    def view(self, view: PlanView) -> Any:
        return view_plan(self.plan if getattr(view, "of_all", False) else self.taken, view)
