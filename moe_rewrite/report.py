"""What was converted, what was not and why; tables for people."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler import Compiler
    from .depth import DepthMap
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
        parts = [_table(["conversion", ""], facts)]
        rows = [(n, f"{i} -> {o}", "LoRA experts") for n, i, o in self.sites]
        rows += [(n, "", f"rejected: {r}") for n, r in self.rejected]
        parts.append(_table(["site", "size", "what was done"], rows))
        return "\n".join(parts)


def depth_table(depth: DepthMap) -> str:
    total = sum(b.flops for b in depth.parts) or 1
    rows = []
    for block in depth.parts:
        inside = block in depth.blocks
        index = str(depth.blocks.index(block)) if inside else ""
        shape = "x".join(block.shape)
        rows.append(
            (index, block.name, shape, _count(block.params), _count(block.flops),
             f"{100 * block.flops / total:.1f}%")
        )  # fmt: skip
    title = f"{depth.model}: {len(depth)} blocks"
    if depth.stack:
        title += f" of {depth.stack} (there are other stacks: name a module to split in them)"
    return _table(["block", "name", "output", "parameters", "FLOPs", "share"], rows, title)


def _count(n: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return str(n)


def _table(columns: list[str], rows: list[Any], title: str | None = None) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(table, markup=False)
    return out.getvalue().rstrip()
