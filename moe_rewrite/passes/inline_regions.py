"""Take the operations of no_grad regions into the graph where no gradient could reach them.

Rotary tables, for example, are made of positions alone. What is left as a region computes on
weights or features, and keeps its gradients out in evaluation and training alike.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.static_values import made_of_weights
from ..ir.ops import must_stay, output_of, subgraph
from ..ir.program import Program
from .base import Decisions, Pass

REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Exact: the same operations in the same order."""

    name = "inline regions"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        of_weights = made_of_weights(program)
        inline(program.graph, (n for n in program.graph.nodes if n not in of_weights))
        return self.done(program)


def inline(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Inline the regions among these nodes, except those with further regions inside."""
    for node in [n for n in nodes if n.target is REGION]:
        inner, given = subgraph(node)
        if inner is None or inner.find_nodes(op="get_attr"):
            continue
        copies = dict(zip(inner.find_nodes(op="placeholder"), given, strict=True))
        with graph.inserting_before(node):
            for operation in inner.nodes:
                if operation.op == "call_function":
                    copies[operation] = graph.node_copy(operation, copies.__getitem__)
        made = output_of(inner)
        for part in list(node.users):
            assert part.target is operator.getitem
            _, at = part.args
            part.replace_all_uses_with(copies[made[at]])
            graph.erase_node(part)
        graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=must_stay)
