"""What a pass is, and what a conversion has decided when it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..config import RouterSpec
from ..errors import CaptureError
from ..ir.program import Numerics, Program
from ..ir.sites import AnySite, Rejection


@dataclass(frozen=True)
class Decisions:
    """What is decided on a conversion's first graphs; every later graph follows it.

    split: where graphs are cut: what was asked for, then a block's index or a module's name.
    router: with nothing left open.
    shallow: dotted names of the modules that run before the cut only.
    sites: names of those that hold experts; None before that is decided.
    rejected: the others, with the reason.
    containers_eval: modules around the cut are in evaluation in training graphs, too.
    train_note: why they are.
    """

    split: int | float | str
    router: RouterSpec | None = None
    shallow: frozenset[str] = frozenset()
    sites: frozenset[str] | None = None
    rejected: tuple[Rejection, ...] = ()
    containers_eval: bool = False
    train_note: str = ""

    @property
    def chosen(self) -> RouterSpec:
        assert self.router is not None
        return self.router


class Pass(ABC):
    """One rewriting of a program: a frozen dataclass whose fields are its options.

    name: under which the report times it. numerics: what it does to the numbers computed.
    """

    name: str
    numerics: Numerics = "exact"

    @abstractmethod
    def apply(self, program: Program, decisions: Decisions) -> Program:
        """The program that comes after; it may be the given one, edited in place."""

    def done(self, program: Program, **changes: Any) -> Program:
        """The program with these changes, checked, and this pass on record."""
        return program.after(self.name, self.numerics, **changes)


def sites_to_convert(program: Program, decisions: Decisions) -> dict[AnySite, Any]:
    """The sites found in this graph that hold experts, each with its uses.

    Raises CaptureError where one cannot hold them in this graph.
    """
    assert program.found is not None
    wanted = decisions.sites
    if wanted is None:
        return program.found.sites
    reasons = [f"{r.name}: {r.reason}" for r in program.found.rejected if r.name in wanted]
    if reasons:
        leaves = [leaf.name for leaf in program.leaves()]
        raise CaptureError(
            f"with the arguments {leaves}, sites that hold experts cannot be routed: "
            f"{'; '.join(reasons)}. Call without the argument that changes this."
        )
    return {site: uses for site, uses in program.found.sites.items() if site.name in wanted}
