"""Graphs for values of any memory layout: the example had one, a call may bring another.

A trace writes `view` for a `reshape` or a `flatten` that copied nothing on the example; PyTorch
refuses that view where strides are others (channels-last weights, inputs that are expanded or
transposed).
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import fx

from .ops import alias_root, mutated

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default}


def written_roots(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory these nodes write to."""
    return {alias_root(w) for n in nodes for w in mutated(n)}


def may_copy(node: fx.Node, written: Container[fx.Node]) -> bool:
    """Whether a node is a view which may as well be a copy, since nothing writes to its memory.

    written: see `written_roots`, of the whole graph.
    """
    return node.target in VIEWS and alias_root(node) not in written


def allow_any_layout(graph: fx.Graph) -> None:
    """Let each view that may be a copy be one where strides ask for it: the same values."""
    written = written_roots(graph.nodes)
    for node in graph.nodes:
        if may_copy(node, written):
            node.target = aten.reshape.default
