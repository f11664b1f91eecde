"""The mainline of a graph and its cut points.

The mainline is every float value that depends both on the user's input and on a parameter. A cut
point is a node on every path of the mainline from its source to the output: a dominator of the
output. On residual networks these are the joins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import SplitError
from ..ir.aten import module_paths, reach, value
from ..ir.ops import alias_root, mutated, op, output_of
from ..ir.program import Program
from .static_values import Static, static_values

CUT_RANKS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Mainline:
    """The mainline of one graph.

    positions: mainline node -> its index in the graph.
    edges: mainline node -> its mainline predecessors.
    sink: the output that the longest computation leads to.
    leaves: the user's inputs.
    static: of `static_values`.
    """

    positions: dict[fx.Node, int]
    edges: dict[fx.Node, list[fx.Node]]
    sink: fx.Node
    leaves: tuple[fx.Node, ...]
    static: Static

    def source(self) -> str | None:
        """The only input, if it carries rows that could be routed (an image); else None."""
        if len(self.leaves) != 1:
            return None
        leaf = self.leaves[0]
        fit = _is_float(value(leaf)) and value(leaf).ndim in CUT_RANKS
        return leaf.name if fit else None

    def chain(self, stack: str | None = None) -> list[fx.Node]:
        """Dominators of the sink in order, from the source or from a stack's first node."""
        import networkx as nx

        live = reach(self.sink, self.edges.__getitem__)
        if stack is not None:
            live &= self._reached_from(stack, live)
        if not live:
            return []
        graph = nx.DiGraph()
        root = "source"
        for node in live:
            inside = [s for s in self.edges[node] if s in live]
            graph.add_edges_from((s, node) for s in inside)
            if not inside:
                graph.add_edge(root, node)
        parents = nx.immediate_dominators(graph, root)
        chain, node = [], self.sink
        while node != root:
            chain.append(node)
            node = parents[node]
        return chain[::-1]

    def _reached_from(self, stack: str, live: set[fx.Node]) -> set[fx.Node]:
        source = next((n for n in self.positions if n in live and _inside(n, stack)), None)
        reached = {source} if source is not None else set()
        for node in self.positions:  # in graph order, so one sweep reaches everything
            if any(s in reached for s in self.edges[node]):
                reached.add(node)
        return reached

    def cut_points(self, stack: str | None = None) -> list[tuple[int, fx.Node]]:
        """(graph position, node) of the cut points whose value can carry rows to route."""
        tensors = [n for n in self.chain(stack) if isinstance(value(n), torch.Tensor)]
        fit = [n for n in tensors if value(n).is_floating_point() and value(n).ndim in CUT_RANKS]
        return [(self.positions[n], n) for n in fit]

    def stacks(self) -> list[str]:
        """Top-level modules that hold numbered modules, like ``encoder`` and ``decoder`` of T5;
        empty if there is only one."""
        tops = self.tops()
        return tops if len(tops) > 1 else []

    def tops(self) -> list[str]:
        """The same, even if there is only one (a decoder alone, on what was encoded before)."""
        tops: dict[str, None] = {}
        for node in self.positions:
            for path, _ in module_paths(node):
                parent, _, last = path.rpartition(".")
                if last.isdigit() and parent:
                    tops[parent.rpartition(".")[0] or parent] = None
                    break
        return list(tops)

    def last_stack(self) -> str | None:
        """The stack that all others feed, as an encoder feeds a decoder."""
        stacks = self.stacks()
        of = {s: {n for n in self.positions if _inside(n, s)} for s in stacks}
        for stack in stacks:
            fed = set(of[stack])
            for node in reversed(self.positions):  # all that its nodes are made of
                if node in fed:
                    fed.update(self.edges[node])
            if all(of[other] & fed for other in stacks if other != stack):
                feeds = self._reached_from(stack, set(self.positions)) - of[stack]
                if not any(feeds & of[other] for other in stacks if other != stack):
                    return stack
        return None


def find_mainline(program: Program) -> Mainline:
    """Raises SplitError where no output depends on both an input and a parameter."""
    user: dict[fx.Node, bool] = {}
    parameter: dict[fx.Node, bool] = {}
    positions: dict[fx.Node, int] = {}
    edges: dict[fx.Node, list[fx.Node]] = {}
    through: dict[fx.Node, list[fx.Node]] = {}  # indices and masks that are made of features
    writers: dict[fx.Node, fx.Node] = {}  # storage -> the mainline node that wrote to it last
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    for node, at in order.items():
        kind = program.inputs[node.name].kind if node.op == "placeholder" else ""
        sources = [n for n in node.all_input_nodes if _carries_value(n)]
        wrote = [(s, writers.get(alias_root(s), s)) for s in sources]
        sources += [w for s, w in wrote if order[w] > order[s]]  # else the source has read it
        by_shape = op(node).sizes_only
        user[node] = kind in ("user", "cache") or (not by_shape and any(user[s] for s in sources))
        parameter[node] = kind == "weight" or (not by_shape and any(parameter[s] for s in sources))
        if node.op == "output" or kind or not (user[node] and parameter[node]):
            continue
        from_ = [p for s in sources for p in ([s] if s in positions else through.get(s, ()))]
        if not _is_float(value(node)):
            through[node] = list(dict.fromkeys(from_))
        else:
            positions[node] = at
            edges[node] = list(dict.fromkeys(from_))
            for written in mutated(node):
                writers[alias_root(written)] = node
    sink = _sink(program, positions, edges)
    return Mainline(positions, edges, sink, tuple(program.leaves()), static_values(program))


def _carries_value(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value(node)))


def _is_float(val: object) -> bool:
    tensors = [v for v in pytree.tree_leaves(val) if isinstance(v, torch.Tensor)]
    return any(t.is_floating_point() or t.is_complex() for t in tensors)


def _sink(
    program: Program, positions: dict[fx.Node, int], edges: dict[fx.Node, list[fx.Node]]
) -> fx.Node:
    """The output that the longest computation leads to (the logits, not a cached key)."""
    outputs = pytree.tree_leaves(output_of(program.graph))
    candidates = [n for n in outputs if isinstance(n, fx.Node) and n in positions]
    if not candidates:
        raise SplitError(f"{program.model}: no output depends on both an input and a parameter")
    return max(candidates, key=lambda n: len(reach(n, edges.__getitem__)))


def _inside(node: fx.Node, path: str) -> bool:
    return any(p == path or p.startswith(path + ".") for p, _ in module_paths(node))
