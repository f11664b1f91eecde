"""RMS norms: write the exporter's products with a reciprocal square root as divisions."""

from __future__ import annotations

import onnx_ir as ir

from .nodes import is_op, made_by, other_input


def divide_by_roots(graph: ir.Graph) -> None:
    """``x * Reciprocal(Sqrt(v))`` -> ``x / Sqrt(v)``, with one rounding less: ONNX Runtime fuses a
    norm into one operator, but only in this form."""
    for node in list(graph.all_nodes()):
        root = node.inputs[0] if is_op(node, "Reciprocal") else None
        if root is None or made_by(root, "Sqrt") is None:
            continue
        inverse = node.outputs[0]
        for product in {use.node for use in inverse.uses() if is_op(use.node, "Mul")}:
            other = other_input(product, inverse)
            product.op_type = "Div"
            product.replace_input_with(0, other)
            product.replace_input_with(1, root)
