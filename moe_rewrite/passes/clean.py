"""Drop asserts, guards and casts without effect from a captured graph; write channel shuffles as
one operator.

Runs before cut points are found, so that none of them is dropped. Random and in-place operations
stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..analysis.channel_shuffle import name_shuffle
from ..ir.aten import value
from ..ir.ops import argument, first, must_stay, op, op_name, takes
from ..ir.program import Program
from .base import Decisions, Pass

END = 2**62  # torch.export writes "to the end" of a slice as the largest int64


@dataclass(frozen=True)
class Clean(Pass):
    """Exact: every dropped node returns its input unchanged, or nothing; shuffles only move values."""

    name = "clean"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        graph = program.graph
        for node in list(graph.nodes):
            if op(node).check:
                graph.erase_node(node)
            elif node.op == "call_function" and _passes_through(node):
                node.replace_all_uses_with(first(node))
                graph.erase_node(node)
            elif node.op == "call_function":
                name_shuffle(node)
        graph.eliminate_dead_code(is_impure_node=must_stay)
        inputs = {n.name: program.inputs[n.name] for n in graph.find_nodes(op="placeholder")}
        return self.done(program, inputs=inputs)


def _passes_through(node: fx.Node) -> bool:
    """Whether the node returns its first argument itself, or a full view of it."""
    if not isinstance(first(node), fx.Node):
        return False
    name = op_name(node)
    if name == "to" and takes(node, "copy"):
        before, after = value(first(node)), value(node)
        same = before.dtype == after.dtype and before.device == after.device
        moved = argument(node, "copy") or argument(node, "memory_format") is not None
        return same and not moved
    if "train" in op(node).evaluation and takes(node, "p"):  # a dropout; recurrent layers do more
        return argument(node, "train") is False
    if name == "slice":
        start, end, step = (argument(node, n) for n in ("start", "end", "step"))
        whole = end is None or (isinstance(end, int) and end >= END)
        return whole and step == 1 and start in (None, 0)
    return False
