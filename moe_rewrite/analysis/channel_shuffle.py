"""Channel shuffles (ShuffleNet, arXiv 1707.01083), as models write them: channels are viewed as
(groups, rest), the two dimensions are swapped, and channels are viewed as one dimension again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import first, op
from .map_layout import moved_order


def name_shuffle(node: fx.Node) -> fx.Node | None:
    """Where this node ends a shuffle, the same as one operator, which is inserted after it."""
    found = _shuffled(node)
    if found is None:
        return None
    with node.graph.inserting_after(node):
        shuffled = node.graph.call_function(torch.ops.aten.channel_shuffle.default, found)
    shuffled.meta = dict(node.meta)
    node.replace_all_uses_with(shuffled)
    return shuffled


def _shuffled(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(the map, the groups) of the shuffle that this node ends."""
    swapped: Any = first(node) if op(node).view else None
    while isinstance(swapped, fx.Node) and op(swapped).cast:
        swapped = first(swapped)
    if not isinstance(swapped, fx.Node) or not op(swapped).transposes:
        return None
    parted: Any = first(swapped)
    if value(swapped).ndim != 5 or moved_order(swapped) != [0, 2, 1, 3, 4] or not op(parted).view:
        return None
    source = first(parted)
    before, between, after = (_sizes(n) for n in (source, parted, node))
    same = before == after and len(before) == 4
    kept = between[:1] + between[3:] == before[:1] + before[2:]
    groups = between[1]
    return (source, groups) if same and kept and isinstance(groups, int) else None


def _sizes(node: fx.Node) -> list[Any]:
    return [*map(expression, value(node).shape)]
