"""Queries on nodes and values, and a helper to add nodes, for the rewrites."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def is_op(node: ir.Node | None, op: str) -> bool:
    """Whether the node is this standard ONNX operator."""
    return node is not None and (node.domain, node.op_type) == ("", op)


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes the value, if it is this standard operator."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op) else None


def only_use(value: ir.Value, op: str) -> ir.Node | None:
    """The only node that reads the value, once, if it is this standard operator."""
    takers = [use.node for use in value.uses()]
    if len(takers) != 1 or value.is_graph_output() or not is_op(takers[0], op):
        return None
    return takers[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a binary node that is not `value`; `value` itself if both are."""
    left, right = node.inputs
    return right if left is value else left


def sizes(value: ir.Value | None) -> list[int | str] | None:
    """Its shape, with names for dynamic sizes; None if any size is unknown."""
    if value is None or value.shape is None:
        return None
    found = [size if isinstance(size, int) else size.value for size in value.shape]
    known = [size for size in found if size is not None]
    return known if len(known) == len(found) else None


class Adder:
    """Adds nodes before `before`; their names start with `name`."""

    def __init__(self, graph: ir.Graph, before: ir.Node, name: str | None) -> None:
        self.graph, self.before, self.name = graph, before, name

    def __call__(
        self, op: str, inputs: list[ir.Value], like: ir.Value, name: str, **attributes: Any
    ) -> ir.Value:
        """The output of a new node. like: a value of the same type."""
        node = ir.node(op, inputs, attributes, name=f"{self.name}.{name}")
        made = node.outputs[0]
        made.name, made.type = node.name, like.type
        self.graph.insert_before(self.before, node)
        return made
