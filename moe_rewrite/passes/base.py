"""The interface of a pass, and the decisions of a conversion that passes follow."""

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
    """The decisions taken on a conversion's first graphs; every later graph follows them.

    split: where graphs are cut: the user's `split` first, then a block index or module name.
    router: the router, with no option left at None that depends on the model.
    shallow: dotted names of the modules that run only before the cut.
    weights: names of those that are read before the cut, and of those that are read after it.
    sites: names of the sites that hold experts; None until that is decided.
    rejected: the other sites, with reasons.
    containers_eval: modules that contain the cut are in eval mode in training graphs too.
    evaluated: dotted names of modules that are in eval mode in training graphs too, since they
        would write statistics that are to stay.
    trains: a training graph was captured, which confirmed all this.
    """

    split: int | float | str
    router: RouterSpec | None = None
    shallow: frozenset[str] = frozenset()
    weights: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    sites: frozenset[str] | None = None
    rejected: tuple[Rejection, ...] = ()
    containers_eval: bool = False
    evaluated: frozenset[str] = frozenset()
    trains: bool = False

    @property
    def chosen(self) -> RouterSpec:
        assert self.router is not None
        return self.router


class Pass(ABC):
    """One rewrite of a program: a frozen dataclass whose fields are its options.

    name: under which the report times it.
    numerics: ``"exact"`` (bit for bit), ``"reordered"`` (the same sums in another order) or
        ``"approximate"``.
    """

    name: str
    numerics: Numerics = "exact"

    @abstractmethod
    def apply(self, program: Program, decisions: Decisions) -> Program:
        """The rewritten program; the given one may be edited in place."""

    def done(self, program: Program, **changes: Any) -> Program:
        """The program with these changes, checked, with this pass's numerics recorded."""
        return program.after(self.name, self.numerics, **changes)


def sites_to_convert(program: Program, decisions: Decisions) -> dict[AnySite, Any]:
    """The sites of this graph that are to hold experts, each with its uses.

    Raises CaptureError if a site that was decided on cannot hold experts in this graph.
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
