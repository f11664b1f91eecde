"""Values that all blocks read beside their features: a bias of positions that is looked up by the
call's ids, an embedding a layer. They are made once, before the blocks, and lead around every cut
point; a cut carries them as it carries a mask.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..ir.aten import reach
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
    gone = {side}
    edges: dict[fx.Node, list[fx.Node]] = {}
    for node, sources in line.edges.items():
        kept = [s for s in sources if s not in gone]
        if node is side or (sources and not kept):
            gone.add(node)
        else:
            edges[node] = kept
    if line.sink in gone:
        return line
    positions = {n: at for n, at in line.positions.items() if n in edges}
    return replace(line, positions=positions, edges=edges)
