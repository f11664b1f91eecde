"""One captured graph, bound to a model's blocks, and how it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...ir.conditions import Conditions, Pattern
from ...ir.steps import Emitted, narrowed
from ...kernels.autocast import autocasts
from ...routing.packed_rows import PackedRows
from ...routing.plan import Planner, PrefixState, RoutingPlan
from ...routing.plan_views import OffDevice, Work
from .block_module import BlockModule, Bound, Slot
from .flat_code import FlatCode
from .inference_code import InferenceCode
from .regional import RegionalCode, compiles, outside


@dataclass
class BoundGraph:
    """One compiled signature, bound to a model's blocks.

    names: traced arguments, in order.
    conditions: what a call must meet, with the names in the graph of its leaves.
    steps: each step with the block that runs it.
    out_spec: pytree of the outputs, with a key-value cache as one leaf.
    cache_at: (start, stop) of the outputs that make up this cache.
    mode: "eval" or "train".
    frozen: the shallow segment builds no autograd graph.
    off_device: which experts' weights lie off the device.
    comparable: the dense model can be put in a mode in which it computes the same.
    last_use: number of the latest call that it served.
    allowed: patterns of small sizes (`Conditions.pattern`) that it may serve.
    refused: those for which it differs from the dense model, or was not compared.
    copied: how many calls of blocks were copied from others in its capture.
    after_cut: the steps to run where the features at the cut are given; built on first use.
    flat: the steps as generated code; built on first use.
    inference: the same for calls without gradients.
    regional: the same for torch.compile, for each case (`_case`).
    """

    names: tuple[str, ...]
    conditions: Conditions
    emitted: Emitted
    steps: tuple[tuple[BlockModule, Bound], ...]
    out_spec: Any
    cache_at: tuple[int, int] | None
    mode: str
    frozen: bool
    off_device: OffDevice
    comparable: bool
    last_use: int = 0
    allowed: set[Pattern] = field(default_factory=set)
    refused: set[Pattern] = field(default_factory=set)
    copied: int = 0
    after_cut: tuple[tuple[BlockModule, Bound], ...] | None = None
    flat: FlatCode | None = None
    inference: FlatCode | None = None
    regional: dict[tuple, RegionalCode] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> BoundGraph:
        """The copy runs the same code on the copied model's blocks."""
        steps = tuple(
            (copy.deepcopy(block, memo), replace(bound, slots=copy.deepcopy(bound.slots, memo)))
            for block, bound in self.steps
        )
        return replace(
            self, steps=steps, off_device=copy.deepcopy(self.off_device, memo),
            allowed=set(self.allowed), refused=set(self.refused), after_cut=None, flat=None,
            inference=None, regional={},
        )  # fmt: skip

    def owned(self) -> Iterator[tuple[BlockModule, torch.Tensor]]:
        """Each tensor of the model that a block runs on, with the block."""
        for block, bound in self.steps:
            for ref in bound.slots:
                if isinstance(ref, Slot):
                    yield block, ref.get()
                elif type(ref) is tuple:
                    site, _ = ref
                    yield from ((block, parameter) for parameter in site.parameters())

    def features(self, leaves: list[Any]) -> torch.Tensor:
        """The features at the cut."""
        seen: list[torch.Tensor] = []

        def look(features: torch.Tensor, mask: Any) -> tuple[Any, None]:
            seen.append(features)
            return None, None

        self.plan(leaves, look)
        return seen[0]

    def plan(
        self, leaves: list[Any], planner: Planner, features: torch.Tensor | None = None
    ) -> tuple[RoutingPlan, PrefixState | None]:
        """Run up to the cut and return the plan; if the features are given, run only the router."""
        values = self._values(leaves)
        if features is not None and not self.emitted.tables:
            return planner(features, values[MASK])
        for block, bound in self.steps:
            if bound.step.deep:
                break
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                _advance(values, bound, block(bound, None, *_taken(values, bound)))
        if features is not None:
            values[self.emitted.cut] = features
        return self._plan(values, planner)

    def run(
        self, leaves: list[Any], planner: Planner, checkpoint: bool = False,
        features: torch.Tensor | None = None,
    ) -> tuple[list[Any], RoutingPlan, PrefixState | None]:  # fmt: skip
        """All outputs, the plan, and the router's state after these positions.

        checkpoint: recompute deep blocks in the backward pass.
        features: those at the cut, where they are known: steps that only compute them are skipped.
        """
        if compiles():
            return self._run_compiled(leaves, planner, checkpoint, features)
        return self._run(leaves, planner, checkpoint, features)

    def _run(
        self, leaves: list[Any], planner: Planner, checkpoint: bool, features: torch.Tensor | None
    ) -> tuple[list[Any], RoutingPlan, PrefixState | None]:
        if features is None and not checkpoint and self._flat_code().applies():
            return self._run_flat(leaves, planner)
        values = self._values(leaves)
        steps = self.steps if features is None else self._steps_after_cut()
        work: Work | None = None
        after = None
        for block, bound in steps:
            if bound.step.deep and work is None:
                if features is not None:
                    values[self.emitted.cut] = features
                plan, after = self._plan(values, planner)
                work = Work.of(plan, self.off_device)
                for name, view in self.emitted.views:
                    values[name] = work.view(view)
            taken = _taken(values, bound)
            run = block.checkpointed if checkpoint and bound.step.deep else block
            wanted = bound.step.deep or not self.frozen
            with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                _advance(values, bound, run(bound, work.active if work else None, *taken))
        outputs = [values[o] if isinstance(o, str) else o.value for o in self.emitted.outputs]
        assert work is not None  # something deep follows every cut
        return (
            outputs,
            self._complete(work.plan, [values[n] for _, n in self.emitted.layers]),
            after,
        )

    def _run_flat(
        self, leaves: list[Any], planner: Planner
    ) -> tuple[list[Any], RoutingPlan, PrefixState | None]:
        flat = self._flat_code()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            given = list(flat.shallow(list(leaves), None))
        work, after = self._route(flat, given, leaves, planner)
        device = next(t.device.type for t in leaves if isinstance(t, torch.Tensor))
        if work.active.run and not torch.is_grad_enabled() and not autocasts(device):
            flat = self._inference_code()
        return (*self._finished(flat.deep(given, work.active), work.plan), after)

    def _run_compiled(
        self, leaves: list[Any], planner: Planner, checkpoint: bool, features: torch.Tensor | None
    ) -> tuple[list[Any], RoutingPlan, PrefixState | None]:
        """As `run`, with each step compiled; blocks that do more than their step (hooks, sharding),
        and those after given features, run as without torch.compile."""
        regional = outside(self._regional_code, leaves, checkpoint, features)
        if regional is None:
            return outside(self._run, leaves, planner, checkpoint, features)
        owned = outside(regional.owned, False, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            given = list(regional.shallow(list(leaves), owned))
        plan, after, owned = outside(self._route_compiled, regional, given, leaves, planner)
        return (*outside(self._finished, regional.deep(given, owned), plan), after)

    def _route(
        self, flat: FlatCode, given: list[Any], leaves: list[Any], planner: Planner,
        compiled: bool = False,
    ) -> tuple[Work, PrefixState | None]:  # fmt: skip
        """The plan; `given`, the values that the shallow half carries over, gets the views of it.
        compiled: what runs next is, for any number of experts."""
        values = dict(zip(flat.carried, given, strict=True))
        values[MASK] = self._mask(leaves)
        plan, after = self._plan(values, planner)
        work = Work.of(plan, self.off_device, compiled)
        given += [work.view(view) for _, view in self.emitted.views]
        return work, after

    def _route_compiled(
        self, regional: RegionalCode, given: list[Any], leaves: list[Any], planner: Planner
    ) -> tuple[Any, Any, list[Any]]:
        work, after = self._route(regional, given, leaves, planner, compiled=True)
        return work.plan, after, regional.owned(True, work.active)

    def _finished(self, made: Any, plan: RoutingPlan) -> tuple[list[Any], RoutingPlan]:
        """The outputs, and the plan with the logits of the layers."""
        rest = iter(made)
        outputs = [next(rest) if isinstance(o, str) else o.value for o in self.emitted.outputs]
        return outputs, self._complete(plan, list(rest))

    def _regional_code(
        self, leaves: list[Any], checkpoint: bool, features: torch.Tensor | None
    ) -> RegionalCode | None:
        """None where blocks do more than their steps, or the features are given."""
        if features is not None or not self._flat_code().applies():
            return None
        case = self.mode, self.conditions.pattern(leaves), torch.is_grad_enabled(), checkpoint
        if case not in self.regional:
            self.regional[case] = RegionalCode(
                self.steps, self.emitted, self.conditions.leaves, case, checkpoint
            )
        return self.regional[case]

    def _complete(self, plan: Any, logits: list[Any]) -> Any:
        """The plan with the logits of the layers that have routers of their own."""
        if not self.emitted.layers:
            return plan
        names = (layer for layer, _ in self.emitted.layers)
        return plan.after(dict(zip(names, logits, strict=True)))

    def _flat_code(self) -> FlatCode:
        if self.flat is None:
            self.flat = FlatCode(self.steps, self.emitted, self.conditions.leaves)
        return self.flat

    def _inference_code(self) -> FlatCode:
        if self.inference is None:
            own = InferenceCode(self.steps, self.emitted, self.conditions.leaves)
            self.inference = own if own.differs else self._flat_code()
        return self.inference

    def _mask(self, leaves: list[Any]) -> Any:
        mask = self.emitted.mask
        return (
            leaves[self.conditions.leaves.index(mask)] if mask in self.conditions.leaves else None
        )

    def _steps_after_cut(self) -> tuple[tuple[BlockModule, Bound], ...]:
        """The deep steps, and the parts of shallow steps that they need besides the features."""
        if self.after_cut is None:
            kept = []
            needed = {o for o in self.emitted.outputs if isinstance(o, str)}
            needed |= {table.node for table in self.emitted.tables}
            for block, bound in reversed(self.steps):
                step = bound.step
                if not step.deep:
                    step = narrowed(step, needed - {self.emitted.cut})
                    bound = replace(bound, step=step)
                if step.deep or step.gives:
                    kept.append((block, bound))
                    needed |= set(step.takes)
            self.after_cut = tuple(kept[::-1])
        return self.after_cut

    def _values(self, leaves: list[Any]) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(self.conditions.leaves, leaves, strict=True))
        values[MASK] = self._mask(leaves)
        return values

    def _plan(
        self, values: dict[str, Any], planner: Planner
    ) -> tuple[RoutingPlan, PrefixState | None]:
        mask = values[MASK]
        if self.emitted.tables:
            tables = ((values[t.node], t.attends) for t in self.emitted.tables)
            mask = PackedRows(tuple(tables), mask)
        return planner(values[self.emitted.cut], mask)


COMPILED_AROUND = (BoundGraph.run, BoundGraph._run_compiled)
MASK = "mask of the rows"  # with spaces, so that no value of a graph has this name


def _taken(values: dict[str, Any], bound: Bound) -> list[Any]:
    return [values[n] for n in bound.step.takes]


def _advance(values: dict[str, Any], bound: Bound, given: tuple) -> None:
    values.update(zip(bound.step.gives, given, strict=True))
    for name in bound.step.drops:
        values.pop(name, None)
