"""The list of passes, and the Compiler that runs it on further graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..config import RouterSpec
from ..errors import CaptureError, ConversionError
from ..frontend.capture import TRACING, Sizes, capture
from ..frontend.host import Host
from ..frontend.weights.divided_layers import Part
from ..ir.ops import alias_root, mutated
from ..ir.program import Code, Program
from ..ir.steps import Emitted
from .base import Decisions, Pass
from .clean import Clean
from .divide_experts import DivideExperts
from .emit import emit
from .freeze_shallow import FreezeShallow
from .inline_regions import InlineRegions
from .insert_router import InsertRouter
from .kinds import kind_of
from .modes import modules_in_mode
from .recipe import Recipe
from .split import FindDepth, Split, shallow_modules, silent_modules, weights_by_side
from .widen_head import WidenHead

TO_CUT: tuple[Pass, ...] = (InlineRegions(), Clean(), FindDepth(), Split())


def to_sites(recipe: Recipe) -> tuple[Pass, ...]:
    return (kind_of(recipe.experts).find(recipe),)


def to_experts(recipe: Recipe, router: RouterSpec, head: str | None = None) -> tuple[Pass, ...]:
    """head: see `WidenHead`."""
    kind = kind_of(recipe.experts)
    return (
        *((FreezeShallow(),) if recipe.freeze else ()),
        InsertRouter(),
        kind.insert(recipe, router),
        WidenHead(head),
        *(kind.lower(recipe, router) if recipe.backend != "reference" else ()),
    )


def shallow_of(
    program: Program, host: Host, captured: list[fx.Node] | None = None
) -> frozenset[str]:
    """The host's modules that run only before the cut. captured: see `silent_modules`."""
    known = {name for name, _ in host.module.named_modules(remove_duplicate=False)}
    silent = set() if captured is None else silent_modules(program, captured)
    return frozenset((shallow_modules(program) | silent) & known)


@dataclass
class Timer:
    """Times calls. seconds: spent in each, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def run(
    passes: Iterable[Pass], program: Program, decisions: Decisions, timed: Timer | None = None
) -> Program:
    timed = timed or Timer()
    for one in passes:
        program = timed(one.name, one.apply, program, decisions)
    return program


@dataclass
class Compiler:
    """Compiles graphs of one host, all with the same decisions.

    host: structural copy of the original over the converted model's tensors.
    decisions: settled at conversion, but for what only a training graph shows; see `compile`.
    notes: what the user should know, for the report.
    copy_blocks: blocks that are alike are traced once.
    parts: of weights of which each process has a part (tensor parallel), by state-dict name.
    head: name of the head that the first graph has, "" without; None before it.
    """

    host: Host
    recipe: Recipe
    decisions: Decisions
    timed: Timer
    notes: list[str] = field(default_factory=list)
    codes: dict[tuple, Code] = field(default_factory=dict, repr=False)  # shared by all graphs
    copy_blocks: bool = True
    parts: dict[str, Part] = field(default_factory=dict)
    head: str | None = None

    def capture(
        self, arguments: dict[str, Any], mode: str, sizes: Sizes = "general",
        open_ints: frozenset[str] = frozenset(),
    ) -> Program:  # fmt: skip
        """The host's graph. mode: "eval", or "train" for the deep segment in training mode."""
        with TRACING, modules_in_mode(self.host, mode, self.recipe, self.decisions):
            call = self.host, arguments, mode, sizes, open_ints, self.copy_blocks
            return self.timed(f"capture ({mode})", capture, *call)

    def trace_all_blocks(self) -> None:
        """From now on; after a graph with copied blocks was found to differ from the model."""
        self.copy_blocks = False
        self.notes.append("every block is traced: copies of blocks that look alike differed")

    def compile(
        self, arguments: dict[str, Any], mode: str, sizes: Sizes = "general",
        open_ints: frozenset[str] = frozenset(),
    ) -> tuple[Program, Emitted]:  # fmt: skip
        """Compile one more graph, for a call with a new signature.

        The first training graph confirms the decisions, which were taken on an evaluation graph.
        Raises CaptureError or ConversionError.
        """
        first = mode == "train" and not self.decisions.trains
        to_sites = self._first_to_train if first else self._to_sites
        return self.emitted(self.with_experts(to_sites(arguments, mode, sizes, open_ints)))

    def with_experts(self, program: Program) -> Program:
        passes = to_experts(self.recipe, self.decisions.chosen, self.head)
        if self.parts:
            passes = (*passes, DivideExperts(self.parts))
        made = run(passes, program, self.decisions, self.timed)
        if self.head is None:
            self.head = made.head.name if made.head is not None else ""
        return made

    def emitted(self, program: Program) -> tuple[Program, Emitted]:
        return program, self.timed("emit", emit, program, self.codes)

    def _to_sites(self, *call: Any) -> Program:
        captured = self.capture(*call)
        program = run((*TO_CUT, *to_sites(self.recipe)), captured, self.decisions, self.timed)
        self._require_cut(program)
        return program

    def _require_cut(self, program: Program) -> None:
        """Raises ConversionError if a graph is cut elsewhere than the first one was."""
        now, then = weights_by_side(program), self.decisions.weights
        known = frozenset.union(*now) & frozenset.union(*then)
        if moved := sorted(known & ((now[0] ^ then[0]) | (now[1] ^ then[1]))):
            raise ConversionError(
                f"{program.model} cannot be cut at {self.decisions.split!r} in {program.mode} mode as "
                f"it was at conversion: {moved[0]} is read on another side of the cut. Split at a "
                "block that runs once, or convert with batch_norm='frozen'"
            )

    def _first_to_train(self, *call: Any) -> Program:
        """Modules before the cut that only a training graph shows (dropout) are frozen as well, and
        so are those that write statistics, unless these are to be updated. If a module that
        contains the cut cannot be traced in training mode (layer drop), such modules are captured
        in eval mode, with a note. Nothing changes if this raises."""
        before = self.decisions
        try:
            try:
                program = self._to_sites(*call)
            except CaptureError as error:
                self.decisions = replace(before, containers_eval=True)
                try:
                    program = self._to_sites(*call)
                except CaptureError:
                    raise error from None
                note = f"modules around the cut train in eval mode: {error}".split("\n")[0]
                self.notes.append(note)
            shallow = before.shallow | shallow_of(program, self.host)
            self.decisions = replace(self.decisions, shallow=shallow, trains=True)
            if shallow != before.shallow:
                program = self._to_sites(*call)
            if self.recipe.batch_norm == "frozen" and (writers := _writers(program)):
                program = self._without_statistics(writers, call)
            self._require_sites(program)
        except Exception:
            self.decisions = before
            raise
        return program

    def _without_statistics(self, writers: frozenset[str], call: tuple) -> Program:
        """The training graph with these modules in eval mode, except any that write then too."""
        self.decisions = replace(self.decisions, evaluated=writers)
        program = self._to_sites(*call)
        if left := _writers(program):
            self.decisions = replace(self.decisions, evaluated=writers - left)
            program = self._to_sites(*call)
        if kept := sorted(self.decisions.evaluated):
            self.notes.append(f"keep their statistics, in eval mode: {', '.join(kept)}")
        return program

    def _require_sites(self, program: Program) -> None:
        """Raises ConversionError if a site is absent from a training graph."""
        assert program.found is not None and self.decisions.sites is not None
        reasons = {r.name: r.reason for r in program.found.rejected}
        missing = self.decisions.sites - {site.name for site in program.found.sites}
        if missing:
            named = "; ".join(f"{n}: {reasons.get(n, 'does not run')}" for n in sorted(missing))
            raise ConversionError(
                f"sites that hold experts cannot be routed in training mode: {named}. Convert with "
                "other sites (LoRAExperts(sites=...)), or keep the model in evaluation mode."
            )

    @property
    def fresh(self) -> str:
        """See `ExpertKind.fresh`."""
        return kind_of(self.recipe.experts).fresh(self.recipe, self.decisions.chosen)


def _writers(program: Program) -> frozenset[str]:
    """Dotted names of the modules whose buffers this graph writes."""
    written = {alias_root(w) for n in program.graph.nodes for w in mutated(n)}
    inputs = (program.inputs[n.name] for n in written if n.op == "placeholder")
    return frozenset(i.name.rpartition(".")[0] for i in inputs if i.kind == "buffer")
