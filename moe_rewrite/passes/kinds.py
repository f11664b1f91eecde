"""Kinds of experts: for each, what finds its sites, what inserts it, and what else depends on it.

`register` adds one from outside of this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, Literal

import torch

from ..config import FFNExperts, LoRAExperts, RegionExperts, RouterSpec, TokenRouter
from ..errors import ConfigError
from ..experts.base import ExpertParameters
from ..experts.carved import CarvedExperts
from ..experts.copies import CopiedParameters
from ..experts.ffn.carved_units import CarvedUnits
from ..experts.ffn.routed_copies import RoutedCopies, Upcycling
from ..experts.head import HeadColumns
from ..experts.lora.parameters import LoRAParameters
from ..ir.program import Program
from ..ir.sites import Macs
from ..routing.carve_rule import CarveRule
from ..routing.layer_plan import GateRule
from .base import Pass
from .find_lora_sites import FindLoRASites
from .insert_feedforward import FindFeedForwards, InsertFeedForward
from .insert_lora import InsertLoRA
from .insert_region import FindRegion, InsertRegion
from .lower import Choice, LowerFeedForward, LowerLoRA
from .recipe import EXPERTS, Recipe, gates_sum_to_one

Fresh = Literal["as routed", "everything", "no experts"]


class ExpertKind(ABC):
    """The interface of a kind of experts.

    spec: the dataclass that configures it, which users pass to ``convert(experts=...)``.
    title: the name of the kind, for people.
    elsewhere: text, what to try where nothing after the split can hold such experts.
    cheaper: text, what to choose where experts take more multiply-adds than what they replace; empty
        for kinds that always do.
    onnx: (lowering, description) if exported files have one form only; None if it is chosen.
    """

    spec: type
    title = "experts"
    elsewhere = ""
    cheaper = ""
    onnx: tuple[str, str] | None = ("dense", "every expert on every row")

    @abstractmethod
    def find(self, recipe: Recipe) -> Pass:
        """The pass that sets `Program.found` of a program with a cut."""

    @abstractmethod
    def insert(self, recipe: Recipe, router: RouterSpec) -> Pass:
        """The pass that inserts experts at the sites that were decided on."""

    def lower(self, recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
        """The passes that replace reference operations by fused ones."""
        return ()

    @abstractmethod
    def parameters(self, site: Any, recipe: Recipe) -> ExpertParameters:
        """The module that holds the experts of a site."""

    @abstractmethod
    def words(self, recipe: Recipe) -> str:
        """Text for the report: the experts at a site."""

    def fresh(self, recipe: Recipe, router: RouterSpec) -> Fresh:
        """The plan with which untrained experts give the dense model's output: the router's own
        (``"as routed"``), the frozen region on every patch or every expert on every row
        (``"everything"``), or ``"no experts"``.
        """
        return "as routed"

    def router_words(self, recipe: Recipe, router: RouterSpec) -> str:
        """Text for the report: the router, and where it is if not at the cut."""
        return str(router)

    def rule(self, recipe: Recipe) -> GateRule | CarveRule | None:
        """How a layer's logits become gates, where every layer has a router; else None."""
        return None

    def macs(self, site: Any, recipe: Recipe, router: RouterSpec) -> Macs | None:
        """Multiply-adds of one sample, if experts replace a region; else None."""
        return None

    def notes(self, sites: Iterable[Any]) -> tuple[str, ...]:
        """For the report: what the user should know about these sites."""
        ends = [getattr(site, "ends", "") for site in sites]
        return tuple(f"The region ends where it does since {reason}." for reason in ends if reason)

    def fixed(self, recipe: Recipe) -> str:
        """Why no expert can be added later; empty if they can."""
        return ""


_KINDS: dict[type, ExpertKind] = {}


def register(kind: ExpertKind) -> None:
    """Make `convert(experts=...)` and `load` accept configurations of this kind.

    `kind.spec` must be a dataclass with fields that JSON can represent. Raises ConfigError if it is
    no dataclass, or if another registered class has its name.
    """
    name, known = kind.spec.__name__, EXPERTS.get(kind.spec.__name__)
    if not is_dataclass(kind.spec):
        raise ConfigError(f"{name}: expected a dataclass, since saves store its fields")
    if known is not None and known is not kind.spec:
        raise ConfigError(f"{name}: another class of this name is registered; choose another name")
    _KINDS[kind.spec] = kind
    EXPERTS[kind.spec.__name__] = kind.spec


def kind_of(experts: Any) -> ExpertKind:
    if type(experts) not in _KINDS:
        known = ", ".join(spec.__name__ for spec in _KINDS)
        raise ConfigError(f"experts={experts!r}: expected one of {known}")
    return _KINDS[type(experts)]


def site_modules(program: Program, recipe: Recipe) -> dict[str, ExpertParameters]:
    """Site name -> the module of its experts, including the head's columns."""
    kind = kind_of(recipe.experts)
    made = {site.name: kind.parameters(site, recipe) for site in program.sites}
    if program.head is not None:
        made[program.head.name] = HeadColumns(program.head)
    dtype = getattr(recipe.experts, "dtype", None)
    for module in made.values():
        module.dtype = dtype and getattr(torch, dtype)
    return made


def _choice(recipe: Recipe, router: RouterSpec) -> Choice:
    requested: Any = None if recipe.backend == "auto" else recipe.backend
    return Choice(requested, router, recipe.num_experts)


class _LoRA(ExpertKind):
    spec = LoRAExperts
    title = "LoRA experts"
    elsewhere = (
        "choose other sites (LoRAExperts(sites='all+head') takes the head in), or another router "
        "granularity"
    )
    onnx = ("dense", "stacked low rank, no shape depends on data")

    def find(self, recipe: Recipe) -> Pass:
        return FindLoRASites(recipe.experts)

    def insert(self, recipe: Recipe, router: RouterSpec) -> Pass:
        return InsertLoRA(recipe.experts)

    def lower(self, recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
        return (LowerLoRA(_choice(recipe, router)),)

    def parameters(self, site: Any, recipe: Recipe) -> ExpertParameters:
        return LoRAParameters(site, recipe.experts.rank)

    def words(self, recipe: Recipe) -> str:
        return "LoRA experts"


class _FeedForward(ExpertKind):
    spec = FFNExperts
    title = "feed-forward experts"
    elsewhere = (
        "or convert with mode='pmoe' and experts=LoRAExperts(), which stand beside any linear map"
    )
    onnx = None

    def find(self, recipe: Recipe) -> Pass:
        return FindFeedForwards(recipe.experts)

    def insert(self, recipe: Recipe, router: RouterSpec) -> Pass:
        as_dense = gates_sum_to_one(recipe.experts, router) and not recipe.experts.reinit
        return InsertFeedForward(as_dense, recipe.experts.by_layer, shared=recipe.experts.shared)

    def lower(self, recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
        return (LowerFeedForward(_choice(recipe, router)),)

    def parameters(self, site: Any, recipe: Recipe) -> ExpertParameters:
        if recipe.experts.by_layer:
            assert isinstance(recipe.router, TokenRouter)
            return RoutedCopies(site, recipe.router.init, Upcycling.of(recipe))
        return CopiedParameters(site, stackable=True)

    def router_words(self, recipe: Recipe, router: RouterSpec) -> str:
        if (rule := self.rule(recipe)) is None:
            return str(router)
        assert isinstance(router, TokenRouter)
        kept = "of" if rule.normalized else "before"
        return (
            f"one a layer, on its own input: {rule.score} {kept} the top {rule.top_k or 'all'}, "
            f"init={router.init}"
        )

    def rule(self, recipe: Recipe) -> GateRule | None:
        router = recipe.router
        if not recipe.experts.by_layer or not isinstance(router, TokenRouter):
            return None
        return GateRule(router.top_k, router.gate == "selected", recipe.experts.score)

    def words(self, recipe: Recipe) -> str:
        cut = recipe.experts.granularity
        count = recipe.num_experts // cut
        router = " and a router" if recipe.experts.by_layer else ""
        each = f", each cut into {cut} experts" if cut > 1 else ""
        of = {None: "", "plain": ", a shared one", "sigmoid": ", a shared one times a sigmoid gate"}
        shared = of[recipe.experts.shared]
        return (
            f"{count} cop{'y' if count == 1 else 'ies'} of the feed-forward{each}{shared}{router}"
        )

    def macs(self, site: Any, recipe: Recipe, router: RouterSpec) -> Macs | None:
        own, count = recipe.experts, recipe.num_experts
        if not own.by_layer:
            return None
        taken = min(router.top_k or count, count) / own.granularity + (own.shared is not None)
        rows = count + (own.shared == "sigmoid")
        return Macs(site.macs, round(taken * site.macs), rows * site.features, "token")

    def fresh(self, recipe: Recipe, router: RouterSpec) -> Fresh:
        exact = gates_sum_to_one(recipe.experts, router) and not recipe.experts.reinit
        return "as routed" if exact else "no experts"

    def fixed(self, recipe: Recipe) -> str:
        cut = recipe.experts.granularity
        if cut == 1:
            return ""
        return (
            f"granularity={cut}: experts are parts of copies, and none can be added or removed alone; "
            "convert with another num"
        )


class _Carved(ExpertKind):
    spec = CarvedExperts
    title = "carved experts"
    elsewhere = _FeedForward.elsewhere
    cheaper = "choose fewer experts, whose routers take less, or a smaller share"
    onnx = None

    def find(self, recipe: Recipe) -> Pass:
        return FindFeedForwards(recipe.experts)

    def insert(self, recipe: Recipe, router: RouterSpec) -> Pass:
        return InsertFeedForward(as_dense=True, by_layer=True, bias_once=True)

    def lower(self, recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
        return (LowerFeedForward(_choice(recipe, router)),)

    def parameters(self, site: Any, recipe: Recipe) -> ExpertParameters:
        return CarvedUnits(site, recipe.experts)

    def words(self, recipe: Recipe) -> str:
        own = recipe.experts
        return (
            f"{own.experts} parts of the feed-forward's hidden units, grouped by {own.grouping}: "
            f"{own.shared} for every token and {own.taken - own.shared} of the others"
        )

    def fresh(self, recipe: Recipe, router: RouterSpec) -> Fresh:
        return "everything"

    def router_words(self, recipe: Recipe, router: RouterSpec) -> str:
        return "one a layer, on its own input, fitted to calibration tokens: gate 1 for the experts taken"

    def rule(self, recipe: Recipe) -> CarveRule:
        own = recipe.experts
        return CarveRule(own.shared, own.taken - own.shared)

    def macs(self, site: Any, recipe: Recipe, router: RouterSpec) -> Macs:
        own = recipe.experts
        routed = own.taken < own.experts
        run = own.taken * site.macs // own.experts
        return Macs(site.macs, run, own.experts * site.features * routed, "token")

    def fixed(self, recipe: Recipe) -> str:
        return (
            "carved experts are the dense feed-forward's own hidden units, and none can be added or "
            "removed; convert with another CarvedExperts(experts=...)"
        )


class _Region(ExpertKind):
    spec = RegionExperts
    title = "region experts"
    cheaper = (
        "choose fewer or larger patches, a shorter region, RegionExperts(width=...) or halo=False"
    )
    onnx = ("sparse", "TopK, Gather and Scatter, groups of fixed size")

    def find(self, recipe: Recipe) -> Pass:
        return FindRegion(recipe.experts, recipe.num_experts)

    def insert(self, recipe: Recipe, router: RouterSpec) -> Pass:
        return InsertRegion(recipe.experts.statistics == "patches")

    def parameters(self, site: Any, recipe: Recipe) -> ExpertParameters:
        return CopiedParameters(site)

    def words(self, recipe: Recipe) -> str:
        return "experts on patches"

    def fresh(self, recipe: Recipe, router: RouterSpec) -> Fresh:
        experts = recipe.experts
        whole = experts.halo and experts.width == 1 and experts.statistics is None
        return "everything" if whole else "no experts"

    def fixed(self, recipe: Recipe) -> str:
        if recipe.experts.combine == "sum":
            return ""
        return (
            "combine='concat': the region's output channels are divided among its experts, none is "
            "left for another; convert with combine='sum' to expand"
        )

    def macs(self, site: Any, recipe: Recipe, router: RouterSpec) -> Macs | None:
        count = recipe.num_experts
        patches = count * (getattr(router, "per_expert", None) or 1)
        return Macs(site.dense_macs, patches * site.expert_macs, count * site.score_macs)


for _kind in (_LoRA(), _FeedForward(), _Carved(), _Region()):
    register(_kind)
