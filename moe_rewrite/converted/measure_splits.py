"""``split="auto"`` by measurement: how well the tasks of some calibration batches are told apart by a
router in closed form at every possible cut. The features of all cuts are read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..config import TokenRouter
from ..errors import CaptureError, ConfigError, InputError, SplitError
from ..frontend.choose_host import host_of
from ..frontend.hooks import require_no_hooks
from ..frontend.host import Host
from ..frontend.weights.structural_copy import named_tensors, structural_copy
from ..ir.program import Program
from ..ir.split_curve import SplitCurve, SplitPoint
from ..passes.base import Decisions
from ..passes.features_at_cuts import (
    CutAtBlock,
    FeatureGraph,
    Read,
    cuts_at_blocks,
    feature_graph,
    with_depth,
)
from ..passes.pipeline import Compiler, Timer
from ..passes.recipe import Recipe
from ..routing.ridge_gate import AnalyticGate
from ..routing.select import make_router
from ..routing.separation import separation
from .graphs.call import Call
from .parameters import device_and_dtype

POSITIONS = 4  # of a sequence that a router is asked about: neighbours have nearly the same mean

Calibration = Mapping[str, Iterable[Any]]


def measure_splits(model: nn.Module, recipe: Recipe, calibration: Calibration) -> SplitCurve:
    """The curve of a dense model, which is neither run nor changed: a copy of its structure is.

    recipe: options of a conversion with split="auto".
    calibration: as for `convert`.

    Raises ConfigError for a recipe without a router at the cut, or with a split of its own;
    InputError for calibration of one task only, of tasks with fewer than two samples, or with
    features that are not finite; SplitError for a model that can be split nowhere.
    """
    _require_choice(recipe)
    _require_tasks(calibration)
    require_no_hooks(model)
    host = host_of(structural_copy(model).eval())
    device, _ = device_and_dtype(host.module)
    if device.type == "meta":
        raise InputError("calibration of a model on the meta device: its features have no values")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        return _Measurement(host, recipe, device).curve(calibration)


def _require_choice(recipe: Recipe) -> None:
    if getattr(recipe.experts, "by_layer", False):
        raise ConfigError(
            f"calibration with {type(recipe.experts).__name__}: every layer has a router of its own, "
            "and calibration chooses the place of the one at the cut; leave it out"
        )
    if recipe.split != "auto":
        raise ConfigError(
            f"split={recipe.split!r} with calibration: expected 'auto', which the calibration batches "
            "decide; leave one of the two out"
        )


def _require_tasks(calibration: object) -> None:
    if not isinstance(calibration, Mapping):
        raise InputError(
            f"calibration={type(calibration).__name__}: expected a dict, from the name of a task to a "
            "list of its batches"
        )
    if len(calibration) < 2:
        raise InputError(
            f"calibration of {len(calibration)} task{'' if calibration else 's'}: expected two or more, "
            "which a router tells apart; what the model can do already may be one"
        )
    for task, batches in calibration.items():
        if isinstance(batches, (torch.Tensor, Mapping)) or not isinstance(batches, Iterable):
            raise InputError(
                f"calibration[{task!r}]={type(batches).__name__}: expected a list of batches in the "
                "form of example_inputs"
            )


@dataclass
class _Measurement:
    """cuts: before every block; known from the first batch on. graphs: of features, by signature."""

    host: Host
    recipe: Recipe
    device: torch.device
    cuts: tuple[CutAtBlock, ...] = ()
    graphs: dict[tuple, list[FeatureGraph]] = field(default_factory=dict)
    gates: dict[tuple, AnalyticGate] = field(default_factory=dict)

    def curve(self, calibration: Calibration) -> SplitCurve:
        rows: dict[int, list[torch.Tensor]] = {}
        tasks = []
        for task, batches in calibration.items():
            of = self._rows(task, batches)
            count = len(next(iter(of.values()))) if of else 0
            if count < 2:
                raise InputError(
                    f"calibration[{task!r}]: {count} sample{'' if count == 1 else 's'}; expected two or "
                    "more, since a router is solved on some and asked about the others"
                )
            tasks.append((task, count))
            for index, read in of.items():
                rows.setdefault(index, []).append(read)
        return SplitCurve(tuple(tasks), tuple(self._point(cut, rows) for cut in self.cuts))

    def _point(self, cut: CutAtBlock, rows: dict[int, list[torch.Tensor]]) -> SplitPoint:
        if cut.router is None:
            return SplitPoint(cut.index, cut.label, cut.after, problem=cut.problem)
        accuracy, error = separation(rows[cut.index], cut.router.ridge)
        return SplitPoint(cut.index, cut.label, cut.after, accuracy, error)

    def _rows(self, task: str, batches: Iterable[Any]) -> dict[int, torch.Tensor]:
        """(N, P, M) of each cut; empty without batches."""
        found: dict[int, list[torch.Tensor]] = {}
        for batch in batches:
            for index, (features, mask) in self._features(batch).items():
                router = self.cuts[index].router
                assert router is not None
                with torch.autocast(self.device.type, enabled=False):
                    rows = self._gate(router, features).sampled(features, mask, POSITIONS)
                if not bool(rows.isfinite().all()):
                    raise InputError(
                        f"calibration[{task!r}]: the features before block {index} "
                        f"({self.cuts[index].label}) hold infinities or NaN, from which no router can "
                        "be solved: pass samples on which the model computes finite values"
                    )
                found.setdefault(index, []).append(rows)
        return {index: torch.cat(rows) for index, rows in found.items()}

    def _gate(self, router: TokenRouter, features: torch.Tensor) -> AnalyticGate:
        """The same random features wherever their width is the same."""
        key = (
            router,
            features.shape[1:2] if features.ndim > 3 else features.shape[-1:],
            features.ndim,
        )
        if key not in self.gates:
            gate = make_router(router, features.shape, self.device)
            assert isinstance(gate, AnalyticGate)
            self.gates[key] = gate
        return self.gates[key]

    def _features(self, batch: Any) -> dict[int, Read]:
        here = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), batch)
        arguments, _, _ = self.host.split_cache(
            self.host.arguments(here), False, self.host.cache_format
        )
        call = Call.of(arguments, "eval", device_and_dtype(self.host.module))
        kept = self.graphs.setdefault(call.key, [])
        graph = next((g for g in kept if g.serves(call.leaves)), None)
        if graph is None:
            kept.append(graph := self._captured(call))
        return graph.read(call.leaves, dict(named_tensors(self.host.module)))

    def _captured(self, call: Call) -> FeatureGraph:
        """A graph whose conditions the call meets. Raises CaptureError or InputError."""
        compiler = Compiler(self.host, self.recipe, Decisions("auto"), Timer(), copy_blocks=False)
        graph: FeatureGraph | None = None
        for sizes in ("general", "ones", "own"):
            try:
                captured = compiler.capture(call.arguments, "eval", sizes)  # type: ignore[arg-type]
            except CaptureError:
                if graph is None:
                    raise
                continue
            graph = self._graph_of(with_depth(captured), call)
            if graph.serves(call.leaves):
                return graph
        assert graph is not None
        raise InputError(
            f"no graph can be captured for this batch: {graph.conditions.violated(call.leaves)}"
        )

    def _graph_of(self, program: Program, call: Call) -> FeatureGraph:
        assert program.depth is not None
        if not self.cuts:
            self.cuts = cuts_at_blocks(program, self.host, self.recipe, call.arguments)
        possible = [cut.index for cut in self.cuts if not cut.problem]
        if not possible:
            reasons = "\n".join(f"  {c.index} ({c.label}): {c.problem}" for c in self.cuts)
            raise SplitError(
                f"split='auto': {program.model} can be split at none of its blocks"
                f"{':' if reasons else ', since it has none.'}\n{reasons or program.depth}"
            )
        blocks = [block.name for block in program.depth.blocks]
        if blocks != [cut.label for cut in self.cuts]:
            raise InputError(
                f"calibration: {program.model} has other blocks for batches with "
                f"{sorted(call.arguments)} than for the first batch; pass batches of one form"
            )
        return feature_graph(program, possible)
