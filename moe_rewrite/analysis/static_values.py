"""The values of a graph that do not depend on the call, and those that do not depend on weights."""

from __future__ import annotations

from torch import fx

from ..ir.ops import op
from ..ir.program import Program

Static = dict[fx.Node, tuple[fx.Node, ...]]


def static_values(program: Program) -> Static:
    """What is computed from parameters, buffers and constants alone -> the parameters and buffers
    among them, in order. Sizes of inputs do not count."""
    static: Static = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = program.inputs[node.name].kind
            if kind in ("weight", "buffer", "constant"):
                static[node] = () if kind == "constant" else (node,)
        elif node.op == "call_function":
            given = [] if op(node).sizes_only else node.all_input_nodes
            sources = [s for s in given if s.op != "get_attr"]  # the sub-graphs of regions
            if all(s in static for s in sources):
                static[node] = tuple(dict.fromkeys(o for s in sources for o in static[s]))
    return static


def made_of_weights(program: Program) -> set[fx.Node]:
    """Parameters, and all that is computed from them."""
    made: set[fx.Node] = set()
    for node in program.graph.nodes:
        weight = node.op == "placeholder" and program.inputs[node.name].kind == "weight"
        if weight or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made
