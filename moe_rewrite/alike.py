"""Which graphs make the same nodes, whatever these are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def target_of(node: fx.Node) -> Any:
    return node.target


def same_code(graph: fx.Graph, target: Callable[[fx.Node], Any] = target_of) -> tuple:
    """Equal for such graphs. target: what takes the place of a node's target there."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    numbered = [
        fx.node.map_arg((n.args, n.kwargs), lambda n: _Number(number[n])) for n in graph.nodes
    ]
    return tuple(
        (n.op, "" if n.op in ("placeholder", "output") else target(n), repr(given))
        for n, given in zip(graph.nodes, numbered, strict=True)
    )


class _Number(str):
    __repr__ = str.__str__
