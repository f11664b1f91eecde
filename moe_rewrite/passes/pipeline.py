"""The list of passes, and what compiles further graphs by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..config import RouterSpec
from ..frontend.capture import capture
from ..frontend.host import Host
from ..ir.program import Program
from ..ir.steps import Emitted
from .base import Decisions, Pass
from .clean import Clean
from .emit import emit
from .freeze_shallow import FreezeShallow
from .insert_router import InsertRouter
from .kinds import kind_of
from .modes import modules_in_mode
from .recipe import Recipe
from .split import FindDepth, Split
from .widen_head import WidenHead

TO_CUT: tuple[Pass, ...] = (Clean(), FindDepth(), Split())


def to_sites(recipe: Recipe) -> tuple[Pass, ...]:
    return (kind_of(recipe.experts).find(recipe),)


def to_experts(recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
    kind = kind_of(recipe.experts)
    return (
        *((FreezeShallow(),) if recipe.freeze else ()),
        InsertRouter(),
        kind.insert(recipe, router),
        WidenHead(),
        *(kind.lower(recipe, router) if recipe.backend != "reference" else ()),
    )


def all_passes(recipe: Recipe, router: RouterSpec) -> tuple[Pass, ...]:
    """From a captured graph to one that is routed."""
    return (*TO_CUT, *to_sites(recipe), *to_experts(recipe, router))


@dataclass
class Timer:
    """seconds: spent, by what was done."""

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


@dataclass(frozen=True)
class Compiler:
    """Compiles graphs of one host, all of them by the same decisions.

    host: structural copy of the original over the converted model's own tensors.
    """

    host: Host
    recipe: Recipe
    decisions: Decisions
    timed: Timer

    def capture(self, arguments: dict[str, Any], mode: str, static_ones: bool = False) -> Program:
        """In evaluation, or with the deep segment in training."""
        with modules_in_mode(self.host, mode, self.recipe, self.decisions):
            name = f"capture ({mode})"
            return self.timed(name, capture, self.host, arguments, mode, static_ones)

    def compile(
        self, arguments: dict[str, Any], mode: str, static_ones: bool = False
    ) -> tuple[Program, Emitted]:
        """One more graph, for a call that the model has not seen."""
        captured = self.capture(arguments, mode, static_ones)
        passes = all_passes(self.recipe, self.decisions.chosen)
        program = run(passes, captured, self.decisions, self.timed)
        return program, self.timed("emit", emit, program)

    @property
    def fresh(self) -> str:
        """The plan by which experts that were just inserted give what the dense model gives."""
        return kind_of(self.recipe.experts).fresh(self.recipe, self.decisions.chosen)
