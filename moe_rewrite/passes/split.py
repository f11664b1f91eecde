"""Find the depth of the model and choose the cut: where the frozen shallow segment ends and the
expandable deep one begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.attention_tables import attention_tables, made_of
from ..analysis.depth import depth_map
from ..analysis.map_layout import is_channels_last, is_line_map
from ..analysis.row_dims import is_positions_first, mask_of_rows, source_of_rows
from ..analysis.streams import order_of_streams
from ..analysis.token_map import find_token_map
from ..ir.aten import module_paths, value
from ..ir.dependencies import is_known_at
from ..ir.ops import first, mutated
from ..ir.program import Cut, Program, Table
from .base import Decisions, Pass


@dataclass(frozen=True)
class FindDepth(Pass):
    """Record the depth map. Exact: the graph is only read."""

    name = "depth"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        return self.done(program, depth=depth_map(program, decisions.split))


@dataclass(frozen=True)
class Split(Pass):
    """Record the cut. Exact. Raises SplitError if the split is not inside the model."""

    name = "split"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        assert program.depth is not None
        at = decisions.split
        index, name = program.depth.resolve(at)
        if program.node(name).op == "placeholder":
            name = _after_input(program, name)
        named = isinstance(at, str) and at != "auto"
        label = str(at) if named else program.depth.blocks[index].name
        node, line = program.node(name), is_line_map(program.node(name))
        if (streams := order_of_streams(program, node)) is not None:
            node = _joined(_moved(node, streams))
        elif line:
            node = _moved(node, [0, 2, 1])
        elif is_channels_last(node):
            last = value(node).ndim - 1
            node = _moved(node, [0, last, *range(1, last)])
        elif is_positions_first(program, node):
            node = _moved(node, [1, 0, 2])
        sequence = value(node).ndim == 3 and not line
        rows = None if line else source_of_rows(program, node)
        token_map = find_token_map(program, node) if sequence else None
        mask = mask_of_rows(program, rows)
        tables: list[Table] = []
        unseen: list[Table] = []
        for table in attention_tables(program, node, mask):
            (tables if is_known_at(node, program.node(table.node)) else unseen).append(table)
        _move_before(node, list(made_of(program, tables)))
        cut = Cut(
            node.name, label, index, rows, mask, token_map, tuple(tables),
            tuple(t.node for t in unseen), line,
        )  # fmt: skip
        return self.done(program, cut=cut)


def _after_input(program: Program, name: str) -> str:
    """Insert a node after the input's placeholder, so that the model can be cut there."""
    leaf = program.node(name)
    last = program.graph.find_nodes(op="placeholder")[-1]
    with program.graph.inserting_after(last):
        features = program.graph.call_function(torch.ops.aten.alias.default, (leaf,))
    features.meta = {"val": value(leaf)}
    leaf.replace_all_uses_with(features, delete_user_cb=lambda user: user is not features)
    return features.name


def _moved(node: fx.Node, order: list[int]) -> fx.Node:
    """Insert a permutation after a value, and its inverse for all who read the value; the model is
    cut between the two, so that routers find features where they expect them: last in a sequence,
    second in a map."""
    back = [order.index(d) for d in range(len(order))]
    graph, permute = node.graph, torch.ops.aten.permute.default
    with graph.inserting_after(node):
        moved = graph.call_function(permute, (node, order))
    with graph.inserting_after(moved):
        again = graph.call_function(permute, (moved, back))
    moved.meta, again.meta = {"val": value(node).permute(order)}, {"val": value(node)}
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not moved)
    return moved


def _joined(node: fx.Node) -> fx.Node:
    """Insert a view that makes one feature vector of a position's streams, and its inverse for all
    who read the value; the model is cut between the two."""
    graph, streams = node.graph, list(value(node).shape[2:])
    with graph.inserting_after(node):
        joined = graph.call_function(torch.ops.aten.flatten.using_ints, (node, 2, 3))
    with graph.inserting_after(joined):
        again = graph.call_function(torch.ops.aten.unflatten.int, (joined, 2, streams))
    joined.meta, again.meta = {"val": value(node).flatten(2)}, {"val": value(node)}
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not joined)
    return joined


def _move_before(cut: fx.Node, nodes: list[fx.Node]) -> None:
    """Let the router know these values: they are computed before the cut."""
    order = {n: i for i, n in enumerate(cut.graph.nodes)}
    for node in (n for n in nodes if order[n] > order[cut]):
        cut.prepend(node)


def segments(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """(shallow, deep): the computing nodes up to the cut and after it, in graph order."""
    assert program.cut is not None
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    at = next(i for i, n in enumerate(nodes) if n.name == program.cut.node)
    return nodes[: at + 1], nodes[at + 1 :]


def shallow_modules(program: Program) -> set[str]:
    """Dotted names of the modules that run only before the cut."""
    before, after = (
        {path for node in part for path, _ in module_paths(node)} for part in segments(program)
    )
    return before - after


def silent_modules(program: Program, captured: list[fx.Node]) -> set[str]:
    """Dotted names of the modules that ran only before the cut, those included whose nodes are gone
    since (a dropout in eval mode). captured: the nodes of the graph as it was captured, in order."""
    assert program.cut is not None
    order = {node: at for at, node in enumerate(captured)}
    cut: Any = program.node(program.cut.node)
    while isinstance(cut, fx.Node) and cut not in order:  # it was inserted after this one
        cut = first(cut)
    if cut not in order:
        return set()
    sides: tuple[set[str], set[str]] = (set(), set())
    for node, at in order.items():
        sides[at > order[cut]].update(path for path, _ in module_paths(node))
    return sides[0] - sides[1]


def weights_by_side(program: Program) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the weights that are read before the cut, and of those that are read after it. What
    only writes to one (RWKV scales its weights first) does not count."""
    found: tuple[set[str], set[str]] = (set(), set())
    for names, nodes in zip(found, map(set, segments(program)), strict=True):
        for node in program.graph.find_nodes(op="placeholder"):
            given = program.inputs[node.name]
            readers = {user for user in node.users if node not in mutated(user)}
            if given.kind == "weight" and not nodes.isdisjoint(readers):
                names.add(given.name)
    return frozenset(found[0]), frozenset(found[1])
