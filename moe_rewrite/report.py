"""What was converted, what was not and why; tables for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .tables import table

if TYPE_CHECKING:
    from .compiler import Compiler
    from .program import Program
    from .verify import EquivalenceReport


@dataclass
class Report:
    """One conversion. Prints as tables; the fields are the same facts for programs.

    sites: (name, in, out) of the converted ones. rejected: (name, reason). seconds: by pass.
    """

    model: str
    mode: str
    split: str
    cut: str
    router: str
    sites: list[tuple[str, int, int]]
    rejected: list[tuple[str, str]]
    numerics: list[tuple[str, str]]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    equivalence: EquivalenceReport | None = None

    @staticmethod
    def of(program: Program, compiler: Compiler) -> Report:
        assert program.cut is not None
        return Report(
            model=type(compiler.host).__name__,
            mode=compiler.recipe.mode,
            split=f"block {program.cut.index} ({program.cut.label})",
            cut=program.cut.node,
            router=str(compiler.router),
            sites=[(s.name, s.in_features, s.out_features) for s in program.sites],
            rejected=[(r.name, r.reason) for r in compiler.rejected],
            numerics=list(program.numerics),
            seconds=compiler.seconds,
            notes=[compiler.train_note] if compiler.train_note else [],
        )

    def __str__(self) -> str:
        facts = [
            ("model", self.model), ("mode", self.mode), ("deep from", self.split),
            ("router", self.router), ("lowering", "reference (stacked low rank)"),
            ("equivalence", str(self.equivalence or "not checked")),
            ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())),
            *(("note", n) for n in self.notes),
        ]  # fmt: skip
        parts = [table(["conversion", ""], facts)]
        rows = [(n, f"{i} -> {o}", "LoRA experts") for n, i, o in self.sites]
        rows += [(n, "", f"rejected: {r}") for n, r in self.rejected]
        parts.append(table(["site", "size", "what was done"], rows))
        return "\n".join(parts)
