"""The gate layout of a value in the deep segment, inferred from symbolic sizes."""

from __future__ import annotations

from torch import fx

from ..config import RouterSpec
from ..ir.aten import value
from ..ir.gate_layout import Flat, GateLayout, OverMap, Rows, Samples, Swapped
from ..ir.program import Program, lead_of
from .row_dims import flattened_from, same_sizes
from .spatial import NCHW, SpatialDims, maps


class Layouts:
    """Gate layouts of one program's values, for the plans of this router."""

    def __init__(self, program: Program, deep: list[fx.Node], router: RouterSpec) -> None:
        assert program.cut is not None
        cut = program.node(program.cut.node)
        self.lead = lead_of(value(cut).shape)
        self.places = maps(deep, cut) if value(cut).ndim == 4 else {}
        self.patches = router.policy == "patch" and value(cut).ndim == 4
        self.per_sample = router.granularity == "sequence" or len(self.lead) == 1

    def of_rows(self, rows: fx.Node) -> GateLayout | str:
        """The layout of a value with features in the last dimension, or why there is none."""
        if self.patches:
            if self.places.get(rows) != SpatialDims(1, 2, 3):
                return (
                    f"its input ({_sizes(value(rows).shape)}) has no patches of the map at the cut"
                )
            return self._over_patches(rows, channels_last=True)
        return self._of_positions(rows) or (
            f"its input ({_sizes(value(rows).shape)}) has rows that are not the plan's "
            f"({_sizes(self.lead)})"
        )

    def of_map(self, rows: fx.Node, over: fx.Node, channels_last: bool = False) -> GateLayout | str:
        """The layout of a feature map (B, C, H, W), or why there is none.

        over: the map that gates are multiplied with (a convolution's output).
        """
        if self.patches:
            if self.places.get(rows) != NCHW:
                return "its input does not lie over the map at the cut"
            return self._over_patches(over, channels_last)
        if not self.per_sample or not same_sizes(value(rows).shape[:1], self.lead[:1]):
            return "a convolution whose positions are not the plan's rows"
        return OverMap(channels_last, None)

    def _over_patches(self, over: fx.Node, channels_last: bool) -> GateLayout | str:
        place = self.places.get(over)
        if place is None:
            return "its input does not lie over the map at the cut"
        height, width = (value(over).shape[d] for d in (place.rows, place.cols))
        if not isinstance(height, int) or not isinstance(width, int):
            return f"its map has no fixed size ({height}, {width})"
        return OverMap(channels_last, (height, width))

    def _of_positions(self, rows: fx.Node) -> GateLayout | None:
        dims, ndim = tuple(value(rows).shape[:-1]), value(rows).ndim
        if self.per_sample and same_sizes(dims[:1], self.lead[:1]):
            return Samples(ndim)
        if not self.per_sample and same_sizes(dims[: len(self.lead)], self.lead):
            return Rows(ndim)
        swapped = self.lead[::-1]
        if len(self.lead) == 2 and same_sizes(dims[:2], swapped):
            return Swapped(ndim)
        source = flattened_from(rows) if len(dims) == 1 and len(self.lead) == 2 else None
        if source is None:
            return None
        before = tuple(value(source).shape)
        if not same_sizes((before[0] * before[1],), dims):
            return None
        if same_sizes(before[:2], self.lead):
            return Flat(swapped=False)
        return Flat(swapped=True) if same_sizes(before[:2], swapped) else None


def _sizes(shape: tuple) -> str:
    return ", ".join(map(str, shape))
