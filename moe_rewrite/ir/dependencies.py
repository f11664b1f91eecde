"""What a value depends on: the nodes that it is made of, and those that write into them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .ops import alias_root, is_random, mutated


def needed_for(values: Iterable[fx.Node]) -> list[fx.Node]:
    """These nodes and all that they depend on, with what writes into one of them before, in order."""
    needed = set(values)
    if not needed:
        return []
    nodes = list(next(iter(needed)).graph.nodes)
    last = max(i for i, n in enumerate(nodes) if n in needed)
    before = nodes[: last + 1]
    writes = [(n, {alias_root(w) for w in mutated(n)}) for n in before if mutated(n)]
    while True:
        size = len(needed)
        for node in reversed(before):
            if node in needed:
                needed.update(node.all_input_nodes)
        roots = {alias_root(n) for n in needed}
        needed.update(n for n, into in writes if into & roots)
        if len(needed) == size:
            return [n for n in before if n in needed]


def is_known_at(place: fx.Node, value: fx.Node) -> bool:
    """Whether a value is final at a place in the graph, or may be computed before it."""
    order = {node: i for i, node in enumerate(value.graph.nodes)}
    if order[value] > order[place]:
        return _can_move(value, order)
    root = alias_root(value)
    return not any(
        alias_root(w) is root for n in order if order[n] > order[value] for w in mutated(n)
    )


def _can_move(value: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nothing that it needs is drawn, and what is written into is made by these nodes alone
    and not read by others before the last write, nor written later."""
    needed = needed_for([value])
    members, writers = set(needed), [n for n in needed if mutated(n)]
    if any(map(is_random, needed)):
        return False
    written = {alias_root(w) for n in writers for w in mutated(n)}
    if any(root.op != "call_function" for root in written):
        return False
    last = max((order[n] for n in writers), default=-1)
    for other in order:
        reads = other not in members and any(
            alias_root(n) in written for n in other.all_input_nodes
        )
        writes = reads and any(alias_root(w) in written for w in mutated(other))
        if writes or (reads and order[other] < last):
            return False
    return True
