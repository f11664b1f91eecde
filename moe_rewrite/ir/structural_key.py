"""Equality of graphs up to the names of their nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..utils.content_key import content_key


def target_of(node: fx.Node) -> Any:
    return node.target


def structural_key(graph: fx.Graph, target: Callable[[fx.Node], Any] = target_of) -> tuple:
    """A key that is equal for graphs with the same nodes up to their names.

    target: what to use as a node's target in the key. Arguments that are neither nodes nor plain
    values compare by their own ``==``.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}

    def other(value: Any) -> Any:
        return (fx.Node, number[value]) if isinstance(value, fx.Node) else (type(value), value)

    return tuple(
        (
            node.op,
            None if node.op in ("placeholder", "output") else target(node),
            content_key((node.args, node.kwargs), other),
        )
        for node in graph.nodes
    )
