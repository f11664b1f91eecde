"""A region's code for isolated patches: each is an image of its own, whose borders are padded like
the map's (pMoE, arXiv 2306.04073, section 3)."""

from __future__ import annotations

import torch
from torch import fx

from ...analysis.conv_region import Region, map_size
from ...errors import ConversionError
from ...ir import patch_grid
from ...ir.aten import value
from ...ir.ops import first
from ...ir.patch_grid import Table
from ...ir.program import Code, Program
from .patch_code import PatchCode, code_of, device_of, dry_run, one_patch, resize, weights_of
from .statistics import add_statistics, by_position

aten = torch.ops.aten


def isolated_code(
    program: Program, region: Region, grid: int, sizes: dict[fx.Node, int],
    weights: list[torch.Tensor],
) -> PatchCode:  # fmt: skip
    """sizes: for nodes with a number of channels as an argument, the expert's number."""
    entry = patch_grid.patches(*map_size(region.entry), grid)
    exit_ = patch_grid.patches(*map_size(region.exit), grid)
    counts = any(map(region.takes_statistics, region.nodes))
    if counts:
        _require_divided(region, grid)
    # the positions that pad a smaller patch belong to a neighbour: outside
    outside = () if entry.inside is None else (~entry.inside.unsqueeze(1),)
    code, positions = _code(program, region, grid, sizes, masked=bool(outside), counts=counts)
    tables = (*outside, *positions)
    given = one_patch(region, entry, tables, counts)
    made, macs = dry_run(code, given, weights, device_of(region))
    if made != (exit_.rows, exit_.cols):
        raise ConversionError(
            f"region {region.name!r}: an isolated patch of {entry.rows}x{entry.cols} becomes "
            f"{made[0]}x{made[1]}, and a patch of the region's output is {exit_.rows}x{exit_.cols}: "
            "choose a grid that divides both maps, or halo=True"
        )
    return PatchCode(code, entry, exit_, tables, macs, counts)


def _code(
    program: Program, region: Region, grid: int, sizes: dict[fx.Node, int], masked: bool,
    counts: bool,
) -> tuple[Code, list[torch.Tensor]]:  # fmt: skip
    """(the code, the tables of positions that it takes after the mask).

    masked: the code first sets x to zero outside. counts: see `PatchCode`.
    """
    graph = fx.Graph()
    entry = graph.placeholder("x")
    taken = graph.placeholder("taken") if counts else entry
    if masked:
        entry = graph.call_function(
            aten.masked_fill.Scalar, (entry, graph.placeholder("outside"), 0.0)
        )
    varying = [n for n in region.nodes if region.takes_statistics(n) and by_position(n)]
    tables = {n: patch_grid.patches(*map_size(n), grid) for n in varying}
    positions = {n: graph.placeholder(f"positions_{i}") for i, n in enumerate(varying)}
    copies = {n: graph.placeholder(n.name) for n in weights_of(program, region)}
    copies[region.entry] = entry
    for node in region.nodes:
        if region.takes_statistics(node):
            source = first(node)
            given, place = (copies[source], copies[source]), region.places[source]
            at = positions.get(node)
            copies[node] = add_statistics(graph, node, place, given, taken, copies, at)
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
        resize(copies[node], node, sizes)
    return code_of(graph, copies[region.exit]), [_plain(tables[n]).positions for n in varying]


def _plain(table: Table) -> Table:
    assert table.inside is None
    return table


def _require_divided(region: Region, grid: int) -> None:
    """Raises ConversionError where a patch is padded: its statistics would count the padding."""
    read = {first(n) for n in region.nodes if region.takes_statistics(n)}
    for node in (region.entry, *(n for n in region.nodes if n in read)):
        place = region.places[node]
        height, width = (value(node).shape[dim] for dim in (place.rows, place.cols))
        if height % grid or width % grid:
            raise ConversionError(
                f"region {region.name!r}: statistics are taken over patches of the {height}x{width} "
                f"map {node.name}, which grid={grid} does not divide: choose a grid that divides it"
            )
