"""Light HTML for notebooks: tables without script or style sheets of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LEFT = "text-align:left;vertical-align:top"


class Raw(str):
    """HTML that is shown as it is."""


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Cells are escaped, unless they are Raw."""
    head = "".join(f'<th scope="col" style="{LEFT}">{escape(c)}</th>' for c in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    caption = f'<caption style="{LEFT}">{escape(title)}</caption>' if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(title: str, inside: str) -> str:
    """inside: HTML, shown when the title is opened."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def bar(share: float) -> Raw:
    """A share of 1 as a bar, with its percentage."""
    return Raw(
        '<svg width="64" height="9" aria-hidden="true" style="margin-right:.5em">'
        '<rect width="64" height="9" fill="currentColor" opacity=".12"/>'
        f'<rect width="{64 * share:.1f}" height="9" fill="currentColor" opacity=".55"/></svg>'
        f"{100 * share:.1f}%"
    )


def _cell(cell: object) -> str:
    shown = cell if isinstance(cell, Raw) else escape(str(cell))
    return f'<td style="{LEFT}">{shown}</td>'
