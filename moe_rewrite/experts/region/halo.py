"""A region's code for patches with a halo: each patch's output equals the dense region's there.

A value is computed at the positions that the rest of the region needs for a patch. A reader crops
what it needs, and positions outside the map are set to zero again (minus infinity for max-pooling)
before each operation that reads neighbours. Reordered: the same sums, in batches of another shape.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...analysis.conv_region import Region, map_size
from ...analysis.places import NCHW
from ...analysis.spatial import padding_of
from ...analysis.windows import Window, windows
from ...errors import ConversionError
from ...ir import patch_grid
from ...ir.aten import value
from ...ir.ops import first, op, op_name, set_argument
from ...ir.patch_grid import Span
from ...ir.program import Code, Program
from .patch_code import PatchCode, code_of, device_of, dry_run, one_patch, resize, weights_of
from .statistics import add_statistics, by_position

aten = torch.ops.aten
Spans = tuple[Span, Span]


def halo_code(
    program: Program, region: Region, grid: int, sizes: dict[fx.Node, int],
    weights: list[torch.Tensor],
) -> PatchCode:  # fmt: skip
    """The code of each patch with the neighbouring positions that it reads."""
    made = _HaloCode(program, region, grid, sizes)
    code = made.build()
    entry = patch_grid.windows(
        made.exit_size, grid, made.spans[region.entry], map_size(region.entry)
    )
    tables = tuple(table for _, table in made.tables.values())
    given = one_patch(region, entry, tables, made.counts)
    _, macs = dry_run(code, given, weights, device_of(region))
    exit_ = patch_grid.patches(*made.exit_size, grid)
    return PatchCode(code, entry, exit_, tables, macs, made.counts)


class _HaloCode:
    def __init__(
        self, program: Program, region: Region, grid: int, sizes: dict[fx.Node, int]
    ) -> None:
        self.region, self.grid, self.sizes = region, grid, sizes
        self.exit_size = map_size(region.exit)
        self.patch = tuple(patch_grid.largest(n, grid) for n in self.exit_size)
        self.spans = self._spans()
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {region.entry: self.graph.placeholder("x")}
        self.tables: dict[Any, tuple[fx.Node, torch.Tensor]] = {}
        self.masked: dict[Any, fx.Node] = {}
        self.counts = any(map(region.takes_statistics, region.nodes))
        self.last_table = self.copies[region.entry]
        if self.counts:
            self.taken = self.last_table = self.graph.placeholder("taken")
        for node in weights_of(program, region):
            self.copies[node] = self.graph.placeholder(node.name)

    def build(self) -> Code:
        for node in self.region.nodes:
            if self.region.takes_statistics(node):
                self.copies[node] = self._statistics(node)
            elif node in self.region.places:
                self.copies[node] = self._map(node)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
                self.copies[node].meta = {}
                resize(self.copies[node], node, self.sizes)
        return code_of(self.graph, self.copies[self.region.exit])

    def _spans(self) -> dict[fx.Node, Spans]:
        """The positions at which each value is computed: all that its readers need."""
        spans: dict[fx.Node, Spans] = {self.region.exit: (Span(), Span())}
        for node in reversed(self.region.nodes):
            if self.region.takes_statistics(node):
                source = first(node)
                own = own_span(self.region, source, self.grid)
                spans[source] = _join(spans.get(source), own, self.region, source)
            if node is self.region.entry or node not in spans:
                continue
            needed = _read(spans[node], windows(node, self.region.places[node]))
            for source in node.all_input_nodes:
                if source in self.region.places:
                    spans[source] = _join(spans.get(source), needed, self.region, source)
        for node in self.region.maps():
            if node.target is operator.getitem:  # an element has the positions of its tuple
                spans[node] = spans[first(node)]
        return spans

    def _map(self, node: fx.Node) -> fx.Node:
        """The node's copy, at the positions where it is needed."""
        ways = windows(node, self.region.places[node])
        needed = _read(self.spans[node], ways)
        read = [s for s in node.all_input_nodes if s in self.region.places]
        given = {s: self._cropped(s, needed, ways) for s in read}
        kind, source = op(node).positions, None
        if isinstance(first(node), fx.Node):
            source = given.get(first(node))
        if kind == "pad":
            return self._channel_padding(node, source)
        if kind == "slice" and any(w.stride != 1 or w.padding for w in ways):
            return self._strided(source, ways, self.region.places[node])
        copy = self.graph.node_copy(node, lambda n: given.get(n) or self.copies[n])
        copy.meta = {}
        resize(copy, node, self.sizes)
        if op_name(node) == "conv2d":  # its padding may be a string, "same" or "valid"
            copy.target = aten.conv2d.default
        if kind in ("convolution", "pool"):
            set_argument(copy, "padding", [0, 0])
        return self._clean(copy, node)

    def _statistics(self, node: fx.Node) -> fx.Node:
        """Statistics over the positions that the patches have to themselves, for all of them."""
        source, at = first(node), None
        place, plain = self.region.places[source], (Window(), Window())
        own = self._cropped(source, own_span(self.region, source, self.grid), plain)
        x = self._cropped(source, self.spans[node], plain) if node in self.spans else own
        if by_position(node):
            size, spans = map_size(node), self.spans[node]
            positions = patch_grid.windows(self.exit_size, self.grid, spans, size).positions
            at = self._table(("positions", spans, size), positions)
        return add_statistics(self.graph, node, place, (x, own), self.taken, self.copies, at)

    def _clean(self, copy: fx.Node, node: fx.Node) -> fx.Node:
        """Zero the positions outside the map after max-pooling, where they are minus infinity."""
        if op_name(node) != "max_pool2d":
            return copy
        return self._mask(copy, self.spans[node], node, 0.0)

    def _cropped(self, source: fx.Node, needed: Spans, ways: tuple[Window, Window]) -> fx.Node:
        """The part of a value that a reader needs, masked outside the map for windows."""
        spans, place = self.spans[source], self.region.places[source]
        copy = self.copies[source]
        if isinstance(value(source), (tuple, list)):
            return copy
        neighbours = any(w.kernel > 1 or w.padding > 0 for w in ways)
        cropped = copy
        for dim, have, need, patch in zip(
            (place.rows, place.cols), spans, needed, self.patch, strict=True
        ):
            first, size = need.low - have.low, need.size(patch)
            if first or size != have.size(patch):
                args: Any = (cropped, dim, first, first + size)
                cropped = self.graph.call_function(aten.slice.Tensor, args)
        if not neighbours:
            return cropped
        fills = {w.fill for w in ways}
        return self._mask(cropped, needed, source, fills.pop())

    def _mask(self, copy: fx.Node, spans: Spans, node: fx.Node, fill: float) -> fx.Node:
        if self.region.places[node] != NCHW:
            raise ConversionError(f"{node.name}: neighbours are read of a map that was permuted")
        size = map_size(node)
        inside = patch_grid.windows(self.exit_size, self.grid, spans, size).inside
        if inside is None:
            return copy
        if (copy, fill) not in self.masked:
            outside = self._table(("outside", spans, size), ~inside.unsqueeze(1))
            args: Any = (copy, outside, fill)
            self.masked[copy, fill] = self.graph.call_function(aten.masked_fill.Scalar, args)
        return self.masked[copy, fill]

    def _table(self, key: Any, table: torch.Tensor) -> fx.Node:
        """The placeholder of a mask, or of a table of positions; equal ones share one."""
        if key not in self.tables:
            name, *_ = key
            with self.graph.inserting_after(self.last_table):
                self.last_table = self.graph.placeholder(f"{name}_{len(self.tables)}")
            self.tables[key] = self.last_table, table
        return self.tables[key][0]

    def _channel_padding(self, node: fx.Node, source: Any) -> fx.Node:
        """Only the padding of channels: positions are padded by the mask."""
        pads = padding_of(node)
        place, ndim = self.region.places[node], value(node).ndim
        for dim in (place.rows, place.cols):
            at = 2 * (ndim - 1 - dim)
            pads[at : at + 2] = [0, 0][: len(pads) - at] if at < len(pads) else []
        if not any(pads):
            return source
        copy = self.graph.node_copy(node, lambda n: source if n is first(node) else self.copies[n])
        copy.meta = {}
        set_argument(copy, "pad", pads)
        return copy

    def _strided(self, source: Any, ways: tuple[Window, Window], place: Any) -> fx.Node:
        for dim, way in zip((place.rows, place.cols), ways, strict=True):
            if way.stride != 1:
                args: Any = (source, dim, 0, 2**62, way.stride)
                source = self.graph.call_function(aten.slice.Tensor, args)
        return source


def own_span(region: Region, node: fx.Node, grid: int) -> Spans:
    """The positions of a map that patches have to themselves.

    Raises ConversionError unless the grid divides the map, and so that patches lie where those of
    the region's exit do.
    """
    place, exit_size = region.places[node], map_size(region.exit)
    lengths = [int(value(node).shape[dim]) for dim in (place.rows, place.cols)]
    if any(n % grid or m % grid or n % m for n, m in zip(lengths, exit_size, strict=True)):
        raise ConversionError(
            f"region {region.name!r}: statistics are taken over patches of {node.name}, a map of "
            f"{lengths[0]}x{lengths[1]}, and the region's output is {exit_size[0]}x{exit_size[1]}: "
            f"expected maps that grid={grid} divides, the one a multiple of the other. Choose "
            "another grid, or a region that ends elsewhere"
        )
    strides = [n // m for n, m in zip(lengths, exit_size, strict=True)]
    return tuple(Span(s, 0, s - 1) for s in strides)  # type: ignore[return-value]


def _read(spans: Spans, ways: tuple[Window, Window]) -> Spans:
    """The spans of its input that an operation needs for `spans` of its output."""
    return tuple(  # type: ignore[return-value]
        Span(
            s.stride * w.stride,
            s.low * w.stride - w.padding,
            s.high * w.stride - w.padding + w.dilation * (w.kernel - 1),
        )
        for s, w in zip(spans, ways, strict=True)
    )


def _join(known: Spans | None, needed: Spans, region: Region, node: fx.Node) -> Spans:
    if known is None:
        return needed
    if any(a.stride != b.stride for a, b in zip(known, needed, strict=True)):
        raise ConversionError(
            f"region {region.name!r}: paths of different stride start at {node.name}"
        )
    return tuple(  # type: ignore[return-value]
        Span(a.stride, min(a.low, b.low), max(a.high, b.high))
        for a, b in zip(known, needed, strict=True)
    )
