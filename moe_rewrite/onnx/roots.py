"""Products with a reciprocal root, as the exporter writes root-mean-square norms, as divisions."""

from __future__ import annotations

import onnx_ir as ir


def divide_by_roots(graph: ir.Graph) -> None:
    """``x * Reciprocal(Sqrt(v))`` -> ``x / Sqrt(v)``, one rounding less: ONNX Runtime has one operator
    for a whole norm, but knows it by this form alone."""
    for node in list(graph.all_nodes()):
        root = node.inputs[0] if _is(node, "Reciprocal") else None
        if root is None or not _is(root.producer(), "Sqrt"):
            continue
        inverse = node.outputs[0]
        for product in {use.node for use in inverse.uses() if _is(use.node, "Mul")}:
            product.op_type = "Div"
            left, right = product.inputs
            product.replace_input_with(0, right if left is inverse else left)
            product.replace_input_with(1, root)
        if not inverse.uses() and not inverse.is_graph_output():
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _is(node: ir.Node | None, op: str) -> bool:
    return node is not None and (node.domain, node.op_type) == ("", op)
