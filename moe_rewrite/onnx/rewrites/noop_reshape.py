"""Drop reshapes to the shape that a value already has."""

from __future__ import annotations

import onnx_ir as ir

from .nodes import is_op, sizes


def drop_reshapes(graph: ir.Graph) -> None:
    """The exporter writes one after each attention."""
    for node in list(graph.all_nodes()):
        if not is_op(node, "Reshape") or node.outputs[0].is_graph_output():
            continue
        value, made = node.inputs[0], node.outputs[0]
        if value is not None and sizes(value) is not None and sizes(value) == sizes(made):
            ir.convenience.replace_all_uses_with(made, value)
