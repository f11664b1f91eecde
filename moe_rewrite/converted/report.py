"""What was converted, what was not and why; tables for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import FFNExperts, LoRAExperts, PatchRouter
from ..ir.sites import HeadSite, RegionSite
from ..utils.text_tables import count, table
from ..utils.warn import warn

if TYPE_CHECKING:
    from ..ir.equivalence import EquivalenceReport
    from ..ir.program import Program
    from ..passes.pipeline import Compiler


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one sample: of the dense region, and of what takes its place."""

    dense: int
    experts: int
    router: int

    @property
    def routed(self) -> int:
        return self.experts + self.router

    def __str__(self) -> str:
        share = f"{100 * self.routed / self.dense:.1f}%" if self.dense else "100%"
        return (
            f"{count(self.experts)} multiply-adds a sample and {count(self.router)} of the router, "
            f"{share} of the dense region's {count(self.dense)}"
        )


@dataclass
class Report:
    """One conversion. Prints as tables; the fields are the same facts for programs.

    sites: (name, in, out) of the converted ones. rejected: (name, reason). seconds: by pass.
    macs: the multiply-adds of a region and of the experts in its place, where there is one.
    experts: what is at the sites; lowered: (name, how it is computed) of sites.
    """

    model: str
    mode: str
    split: str
    cut: str
    router: str
    sites: list[tuple[str, Any, Any]]
    rejected: list[tuple[str, str]]
    numerics: list[tuple[str, str]]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    macs: Macs | None = None
    experts: str = ""
    lowered: list[tuple[str, str]] = field(default_factory=list)
    equivalence: EquivalenceReport | None = None

    @staticmethod
    def of(program: Program, compiler: Compiler) -> Report:
        assert program.cut is not None
        region = next((s for s in program.sites if isinstance(s, RegionSite)), None)
        return Report(
            model=type(compiler.host).__name__,
            mode=compiler.recipe.mode,
            split=f"block {program.cut.index} ({program.cut.label})",
            cut=program.cut.node,
            router=str(compiler.router),
            sites=[
                (s.name, s.in_features, s.out_features)
                for s in program.sites
                if not isinstance(s, HeadSite)
            ],
            rejected=[(r.name, r.reason) for r in compiler.rejected],
            numerics=list(program.numerics),
            seconds=compiler.seconds,
            notes=[n for n in (compiler.train_note, _ends(region)) if n],
            macs=None if region is None else _macs(region, compiler),
            experts=_experts(compiler),
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
        """Sites that are computed alike in one row."""
        alike: dict[str, list[str]] = {}
        for name, how in self.lowered:
            alike.setdefault(how, []).append(name)
        return [
            (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", how)
            for how, names in alike.items()
        ]

    def _done(self) -> str:
        return self.experts if self.macs is None else f"{self.experts}: {self.macs}"

    def __str__(self) -> str:
        facts = [
            ("model", self.model), ("mode", self.mode), ("deep from", self.split),
            ("router", self.router),
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


def _experts(compiler: Compiler) -> str:
    """What is at the sites."""
    experts = compiler.recipe.experts
    if isinstance(experts, LoRAExperts):
        return "LoRA experts"
    if isinstance(experts, FFNExperts):
        count = compiler.recipe.num_experts
        return f"{count} cop{'y' if count == 1 else 'ies'} of the feed-forward"
    return "experts on patches"


def _ends(region: RegionSite | None) -> str:
    return f"the region ends where it does since {region.ends}" if region and region.ends else ""


def _macs(region: RegionSite, compiler: Compiler) -> Macs:
    router = compiler.router
    assert isinstance(router, PatchRouter) and router.per_expert is not None
    experts = compiler.recipe.num_experts
    patches = experts * router.per_expert
    return Macs(region.dense_macs, patches * region.expert_macs, experts * region.score_macs)
