"""The report of a conversion: what was converted, what was not and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.conditions import conditions_of
from ..ir.sites import Macs
from ..passes.kinds import kind_of
from ..utils.text_tables import table
from ..utils.warn import warn

if TYPE_CHECKING:
    from ..ir.equivalence import EquivalenceReport
    from ..ir.program import Numerics, Program
    from ..passes.pipeline import Compiler


@dataclass
class Report:
    """The report of one conversion. ``print(report)`` shows it as tables.

    model: class of the original.
    mode: ``"pmoe"`` or ``"upcycle"``.
    split: the first deep block, by index and name.
    cut: graph node whose value the router reads.
    router: the router that was chosen, with its options.
    sites: (name, input features, output features) of the converted sites.
    rejected: (name, reason) of the others.
    conditions: on the sizes of a call, for the first graph; other calls get other graphs.
    numerics: (pass, ``"exact"``, ``"reordered"`` or ``"approximate"``).
    seconds: time spent, by pass.
    notes: what the user should know.
    macs: multiply-adds of a region and of the experts that replace it; None without a region.
    experts: the experts at a site, as text.
    lowered: (site, how it is computed).
    equivalence: the comparison with the original; None where there was none.
    """

    model: str
    mode: str
    split: str
    cut: str
    router: str
    sites: list[tuple[str, Any, Any]]
    rejected: list[tuple[str, str]]
    conditions: list[str]
    numerics: list[tuple[str, Numerics]]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    macs: Macs | None = None
    experts: str = ""
    lowered: list[tuple[str, str]] = field(default_factory=list)
    equivalence: EquivalenceReport | None = None

    @staticmethod
    def of(program: Program, compiler: Compiler) -> Report:
        assert program.cut is not None
        recipe, decisions = compiler.recipe, compiler.decisions
        kind = kind_of(recipe.experts)
        macs = [kind.macs(site, recipe, decisions.chosen) for site in program.sites]
        ends = [getattr(site, "ends", "") for site in program.sites]
        compiler.notes += _of_quantized(program)
        compiler.notes += [f"the region ends where it does since {r}" for r in ends if r]
        return Report(
            model=program.model,
            mode=recipe.mode,
            split=f"block {program.cut.index} ({program.cut.label})",
            cut=program.cut.node,
            router=_router(recipe.experts, decisions.router),
            sites=[(s.name, s.in_features, s.out_features) for s in program.sites],
            rejected=[(r.name, r.reason) for r in decisions.rejected],
            conditions=conditions_of(program.leaves(), program.relations, program.values).texts,
            numerics=list(program.numerics),
            seconds=compiler.timed.seconds,
            notes=compiler.notes,
            macs=next((m for m in macs if m is not None), None),
            experts=kind.words(recipe),
            lowered=list(program.lowered),
        )

    def warn_of_costs(self) -> None:
        """Warn where the experts take more multiply-adds than the region that they replace."""
        if self.macs is None or self.macs.routed <= self.macs.dense:
            return
        note = (
            f"the experts take {self.macs}: choose fewer or larger patches, a shorter region, "
            "RegionExperts(width=...) or halo=False"
        )
        self.notes.append(note)
        warn(note)

    def _how(self) -> list[tuple[str, str]]:
        """Rows of the table: sites that are computed in the same way share one."""
        same: dict[str, list[str]] = {}
        for name, how in self.lowered:
            same.setdefault(how, []).append(name)
        return [
            (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", how)
            for how, names in same.items()
        ]

    def _done(self) -> str:
        return self.experts if self.macs is None else f"{self.experts}: {self.macs}"

    def __str__(self) -> str:
        facts = [
            ("model", self.model), ("mode", self.mode), ("deep from", self.split),
            ("router", self.router),
            *(("condition", c) for c in self.conditions),
            ("equivalence", str(self.equivalence or "not checked")),
            ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())),
            *(("note", n) for n in self.notes),
        ]  # fmt: skip
        parts = [table(["conversion", ""], facts)]
        rows = [(n, f"{i} -> {o}", self._done()) for n, i, o in self.sites]
        rows += [(n, "", f"rejected: {r}") for n, r in self.rejected]
        parts.append(table(["site", "size", "what was done"], rows))
        if self.lowered:
            parts.append(table(["sites", "how they are computed"], self._how()))
        return "\n".join(parts)


def _of_quantized(program: Program) -> list[str]:
    schemes = [i.scheme.partition("(")[0] for i in program.inputs.values() if i.scheme]
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(schemes).items())
    said = "frozen; experts are added to the products that their library computes"
    return [f"quantised weights ({counts}): {said}"] if schemes else []


def _router(experts: Any, router: Any) -> str:
    """Text: the router, and where it is if not at the cut."""
    if not getattr(experts, "by_layer", False):
        return str(router)
    kept = "of" if router.gate == "selected" else "before"
    return (
        f"one a layer, on its own input: {experts.score} {kept} the top {router.top_k or 'all'}, "
        f"init={router.init}"
    )
