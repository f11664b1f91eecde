"""Plain-text tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(drawn, markup=False)
    return out.getvalue().rstrip()


def count(n: int) -> str:
    """A number with a decimal prefix: 1234 -> 1.23k."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return str(n)
