"""Drop asserts, guards and casts without effect from a captured graph; write channel shuffles as
one operator; give a value that was written in part a node after the write.

Runs before cut points are found, so that none of them is dropped. Random and in-place operations
stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.channel_shuffle import name_shuffle
from ..ir.aten import expression, value
from ..ir.ops import alias_root, argument, first, must_stay, mutated, op, op_name, takes
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
        _name_what_was_written(graph)
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


def _name_what_was_written(graph: fx.Graph) -> None:
    """Let what reads a value after a write to a part of it read it by a node of its own, which can be
    a cut point: the write gives the part alone."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    now: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        for written in mutated(node):
            root = alias_root(written)
            whole = value(root)
            if root.op != "call_function" or not isinstance(whole, torch.Tensor):
                continue
            if not whole.is_floating_point() or _sizes(written) == _sizes(root):
                continue
            before = now.get(root, root)
            later = [user for user in before.users if order.get(user, -1) > order[node]]
            if not later:
                continue
            with graph.inserting_after(node):
                now[root] = graph.call_function(torch.ops.aten.alias.default, (before,))
            now[root].meta = {**node.meta, "val": whole}
            for user in later:
                user.replace_input_with(before, now[root])


def _sizes(node: fx.Node) -> list[object]:
    """To compare, which symbolic sizes themselves would take for a branch."""
    return [expression(size) for size in value(node).shape]
