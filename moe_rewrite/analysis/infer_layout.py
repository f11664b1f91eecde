"""The gate layout of a value in the deep segment, inferred from symbolic sizes and from the
operations that made it."""

from __future__ import annotations

import torch
from torch import fx

from ..config import RouterSpec
from ..ir.aten import value
from ..ir.gate_layout import (
    Flat,
    GateLayout,
    Gathered,
    LastRows,
    Line,
    OverMap,
    Rows,
    Samples,
    Swapped,
)
from ..ir.program import Program, lead_of
from .line_rows import Along, has_rows, line_rows
from .places import NCHW, SpatialDims
from .row_dims import flattened_from, same_sizes
from .spatial import maps
from .window_rows import WindowRows, Windows

ONE_A_SAMPLE = "TokenRouter(granularity='sequence') gives one gate a sample"


class Layouts:
    """Gate layouts of one program's values, for the plans of this router."""

    def __init__(self, program: Program, deep: list[fx.Node], router: RouterSpec) -> None:
        assert program.cut is not None
        self.cut = cut = program.node(program.cut.node)
        self.lead = lead_of(value(cut).shape)
        self.mapped = value(cut).ndim == 4
        self.places, self.lost = maps(deep, cut) if self.mapped else ({}, {})
        self.patches = router.policy == "patch" and self.mapped
        self.per_sample = router.granularity == "sequence" or len(self.lead) == 1
        self.line = program.cut.line
        self.rows = line_rows(deep, cut) if len(self.lead) == 2 else {}
        self.windows = WindowRows([cut, *deep], self._start, self.lead[0])

    def of_rows(self, rows: fx.Node, made: fx.Node) -> GateLayout | str:
        """The layout of a value with features in the last dimension, or why there is none.

        made: what is computed from it, row by row.
        """
        layout = self._of_rows(rows)
        if isinstance(layout, GateLayout) or self.line:
            return layout
        found = self.windows.of(rows, made)
        if found is None:
            return layout
        shape, positions = tuple(found.table.shape), tuple(found.table.flatten().tolist())
        if self.patches:
            return Gathered(found.base, shape, positions)
        if self.per_sample:
            return Gathered((), shape, (0,) * len(positions))
        return Gathered(None, shape, positions)

    def _start(self, node: fx.Node) -> Windows | None:
        """Where windows are cut out of: a channels-last map, the plan's sequence, or samples."""
        if not isinstance(value(node), torch.Tensor):
            return None
        if self.per_sample and not self.patches:
            batch, *rest = value(node).shape[:-1] or [None]
            whole = same_sizes([batch], self.lead[:1]) and all(isinstance(s, int) for s in rest)
            return Windows((), torch.zeros(1, *rest, dtype=torch.long)) if whole else None
        if self.mapped:
            last = self.places.get(node) == SpatialDims(1, 2, 3) and value(node).ndim == 4
            height, width = value(node).shape[1:3] if last else (None, None)
            if not isinstance(height, int) or not isinstance(width, int):
                return None
            return Windows((height, width), torch.arange(height * width).view(1, height, width))
        along = self.rows.get(node)
        length = self.lead[1] if len(self.lead) == 2 else None
        laid = isinstance(along, Along) and along.dim == 1 and has_rows(node, along, self.cut)
        if not laid or value(node).ndim != 3 or not isinstance(length, int):
            return None
        return Windows((), torch.arange(length).view(1, length))

    def _of_rows(self, rows: fx.Node) -> GateLayout | str:
        sizes = _sizes(value(rows).shape)
        if self.patches:
            if self.places.get(rows) != SpatialDims(1, 2, 3):
                return self._no_patches(
                    rows, f"its input ({sizes}) has no patches of the map at the cut"
                )
            return self._over_patches(rows, channels_last=True)
        along = self.rows.get(rows)
        if not self.per_sample and self.line and not isinstance(along, Along):
            reason = along or f"its input ({sizes}) is not known to have the positions of the line"
            return f"{reason}; {ONE_A_SAMPLE}"
        layout = self._of_positions(rows)
        if layout is None:
            return f"its input ({sizes}) has rows that are not the plan's ({_sizes(self.lead)})"
        if not isinstance(layout, (Rows, Samples)):
            return layout
        equal = same_sizes(self.lead[:1], self.lead[1:]) and isinstance(self.lead[0], int)
        if (
            equal
            and isinstance(along, Along)
            and along.dim == 0
            and has_rows(rows, along, self.cut)
        ):
            return Swapped(layout.ndim)  # as many samples as positions, with positions first
        return layout if isinstance(layout, Samples) else self._contradicts(rows) or layout

    def _contradicts(self, rows: fx.Node) -> str:
        """Why the second dimension has no rows of the plan although its size is theirs. A symbolic
        size is no coincidence; a number may be one. Rows that are shifted (a token shift by padding)
        have the gates of where they come to lie, at fixed sizes as at symbolic ones."""
        along = self.rows.get(rows)
        if along is None or not isinstance(self.lead[1], int):
            return ""
        if isinstance(along, str):
            return along
        if along.dim != 1:
            return f"its input ({_sizes(value(rows).shape)}) does not have the plan's rows second"
        return ""

    def of_map(self, rows: fx.Node, over: fx.Node, channels_last: bool = False) -> GateLayout | str:
        """The layout of a feature map (B, C, H, W), or why there is none; with gates of samples or
        of positions also of a line (B, C, L), or of a volume.

        over: the map that gates are multiplied with (a convolution's output).
        """
        if self.patches:
            if self.places.get(over) != NCHW:
                return self._no_patches(over, "its input does not lie over the map at the cut")
            return self._over_patches(over, channels_last)
        if not same_sizes(value(rows).shape[:1], self.lead[:1]):
            return "a convolution over samples that are not the plan's"
        if self.per_sample:
            return OverMap(channels_last, None, value(over).ndim - 2)
        along = self.rows.get(over)
        if isinstance(along, Along) and along.dim == 2 and has_rows(over, along, self.cut):
            return Line()
        reason = f": {along}" if isinstance(along, str) else ""
        return f"a convolution whose positions are not the plan's rows{reason}; {ONE_A_SAMPLE}"

    def _no_patches(self, node: fx.Node, plain: str) -> str:
        lost = self.lost.get(node)
        return plain if lost is None else f"{plain}: {lost}"

    def _over_patches(self, over: fx.Node, channels_last: bool) -> GateLayout | str:
        place = self.places[over]
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
        along = self.rows.get(rows)
        if (
            isinstance(along, Along)
            and along.dim == 1
            and along.last
            and along.low <= 0 <= along.high
        ):
            return LastRows(ndim, along.last)
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
