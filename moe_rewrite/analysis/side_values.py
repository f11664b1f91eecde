"""Values that blocks read beside their features: a bias of positions that is looked up by the call's
ids, an embedding a layer, the first features, keys of a layer far before. They lead around cut
points; a cut carries them as it carries a mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from torch import fx

from ..ir.aten import module_paths, reach
from .mainline import Mainline

READERS = 3  # a value inside a block has as many readers, but they are near each other
TRIED = 12  # values, those first whose readers are farthest apart


def without_side_values(line: Mainline) -> list[Mainline]:
    """The mainline without one of the values that may be such, one after the other."""
    return [_without(line, side) for side in _candidates(line)]


def _candidates(line: Mainline) -> list[fx.Node]:
    """Values with several readers, those first whose readers are farthest apart."""
    readers: dict[fx.Node, list[int]] = {}
    for node in reach(line.sink, line.edges.__getitem__):
        for source in line.edges[node]:
            readers.setdefault(source, []).append(line.positions[node])
    several = [n for n, at in readers.items() if len(at) >= READERS]
    several.sort(key=lambda n: (min(readers[n]) - max(readers[n]), line.positions[n]))
    return several[:TRIED]


def _without(line: Mainline, side: fx.Node) -> Mainline:
    """The mainline without this value and without what is made of it alone."""
    return _with(line, lambda source, node: side not in (source, node))


def without_jumps(line: Mainline) -> Mainline:
    """The mainline without the edges that jump over a whole block, of the numbered modules with the
    most members. What is computed between two blocks belongs to the second."""
    blocks = _blocks(line)
    firsts = sorted(min(at) for at in blocks)
    lasts = sorted(max(at) for at in blocks)

    def stage(node: fx.Node) -> int:
        at = line.positions[node]
        return bisect_right(lasts, at - 1) if firsts and at >= firsts[0] else -1

    return _with(line, lambda source, node: stage(node) - stage(source) < 2)


def _blocks(line: Mainline) -> list[list[int]]:
    """The positions of each numbered module among siblings, where these are the most."""
    stacks: dict[str, dict[str, list[int]]] = {}
    for node, at in line.positions.items():
        numbered = (p for p, _ in module_paths(node) if p.rpartition(".")[2].isdigit())
        if (path := next(numbered, None)) is not None:
            stacks.setdefault(path.rpartition(".")[0], {}).setdefault(path, []).append(at)
    return list(max(stacks.values(), key=len, default={}).values())


def _with(line: Mainline, stays: Callable[[fx.Node, fx.Node], bool]) -> Mainline:
    """The mainline with those of its edges (source, node) that stay; without nodes of which none
    does."""
    edges: dict[fx.Node, list[fx.Node]] = {}
    for node, sources in line.edges.items():
        kept = [s for s in sources if s in edges and stays(s, node)]
        if kept or not sources:
            edges[node] = kept
    if line.sink not in edges:
        return line
    positions = {n: at for n, at in line.positions.items() if n in edges}
    return replace(line, positions=positions, edges=edges)
