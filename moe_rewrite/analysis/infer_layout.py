"""How the plan's rows lie in a value of the deep segment, judged by symbolic sizes."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..config import PatchRouter, RouterSpec
from ..ir.aten import value
from ..ir.gate_layout import Layout
from ..ir.program import Program, lead_of
from .row_dims import flattened_from, same_sizes
from .spatial import NCHW, Place, maps


class Layouts:
    """Layouts of one program's values, of plans of this router. given: further fields of each."""

    def __init__(
        self, program: Program, deep: list[fx.Node], router: RouterSpec, **given: Any
    ) -> None:
        assert program.cut is not None
        cut = program.node(program.cut.node)
        self.lead = lead_of(value(cut).shape)
        self.places = maps(deep, cut) if value(cut).ndim == 4 else {}
        self.given = given
        self.patches = isinstance(router, PatchRouter) and value(cut).ndim == 4
        granularity = "token" if isinstance(router, PatchRouter) else router.granularity
        self.per_sample = granularity == "sequence" or len(self.lead) == 1

    def of_rows(self, rows: fx.Node) -> Layout | str:
        """Of a value whose last dimension holds the features; or why there is none."""
        if self.patches:
            if self.places.get(rows) != Place(1, 2, 3):
                shown = ", ".join(str(s) for s in value(rows).shape)
                return f"its input ({shown}) has no patches of the map at the cut"
            return self._of_size(rows, rows, "map_last")
        kind = self._kind(rows)
        if kind is None:
            shown = ", ".join(str(s) for s in value(rows).shape)
            plan = ", ".join(str(s) for s in self.lead)
            return f"its input ({shown}) has rows that are not the plan's ({plan})"
        return self._made(rows, kind)

    def of_map(self, rows: fx.Node, over: fx.Node, kind: str = "map") -> Layout | str:
        """Of a feature map (B, C, H, W), over whose like the gates lie; or why there is none."""
        if self.patches:
            if self.places.get(rows) != NCHW:
                return "its input does not lie over the map at the cut"
            return self._of_size(rows, over, kind)
        if not self.per_sample or not same_sizes(value(rows).shape[:1], self.lead[:1]):
            return "a convolution whose positions are not the plan's rows"
        return self._made(rows, kind)

    def _of_size(self, rows: fx.Node, over: fx.Node, kind: str) -> Layout | str:
        place = self.places.get(over)
        if place is None:
            return "its input does not lie over the map at the cut"
        height, width = (value(over).shape[d] for d in (place.rows, place.cols))
        if not isinstance(height, int) or not isinstance(width, int):
            return f"its map has no fixed size ({height}, {width})"
        return self._made(rows, kind, (height, width))

    def _made(self, rows: fx.Node, kind: Any, size: tuple[int, int] | None = None) -> Layout:
        return Layout(kind, value(rows).ndim, value(rows).dtype, size=size, **self.given)

    def _kind(self, rows: fx.Node) -> str | None:
        dims = tuple(value(rows).shape[:-1])
        if self.per_sample and same_sizes(dims[:1], self.lead[:1]):
            return "sample"
        if not self.per_sample and same_sizes(dims[: len(self.lead)], self.lead):
            return "rows"
        swapped = self.lead[::-1]
        if len(self.lead) == 2 and same_sizes(dims[:2], swapped):
            return "swapped"
        source = flattened_from(rows) if len(dims) == 1 and len(self.lead) == 2 else None
        if source is None:
            return None
        before = tuple(value(source).shape)
        if not same_sizes((before[0] * before[1],), dims):
            return None
        if same_sizes(before[:2], self.lead):
            return "flat"
        return "swapped_flat" if same_sizes(before[:2], swapped) else None
