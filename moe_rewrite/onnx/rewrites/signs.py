"""Rotary embeddings: the signs of turned features, in the sines that all layers share."""

from __future__ import annotations

import onnx_ir as ir

from .nodes import Adder, is_op, made_by, only_use, other_input, sizes


def fold_signs(graph: ir.Graph) -> None:
    """``Concat(Neg(a), b) * s`` -> ``Concat(a, b) * (s * signs)``, to the bit, where what is in the
    last parentheses is one value for all that are multiplied by `s`."""
    signed: dict[tuple[int, int, int], ir.Value] = {}
    for node in list(graph):
        halves, product = _halves(node), only_use(node.outputs[0], "Mul")
        factor = other_input(product, node.outputs[0]) if product is not None else None
        negated = made_by(node.inputs[0], "Neg") if node.inputs else None
        if halves is None or negated is None or product is None or product.graph is not graph:
            continue
        if factor is None or factor.dtype is None:
            continue
        key = id(factor), *halves
        if key not in signed:
            signed[key] = _signed(graph, product, factor, halves)
        node.replace_input_with(0, negated.inputs[0])
        product.replace_input_with(0, node.outputs[0])
        product.replace_input_with(1, signed[key])


def _halves(node: ir.Node) -> tuple[int, int] | None:
    """How many features of a Concat of two along the last dimension come from each."""
    shapes = [sizes(value) for value in node.inputs]
    if not is_op(node, "Concat") or len(shapes) != 2 or not (shapes[0] and shapes[1]):
        return None
    if node.attributes["axis"].as_int() not in (-1, len(shapes[0]) - 1):
        return None
    first, second = shapes[0][-1], shapes[1][-1]
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def _signed(
    graph: ir.Graph, product: ir.Node, factor: ir.Value, halves: tuple[int, int]
) -> ir.Value:
    """Before the first product that takes it."""
    name = f"{factor.name}.signs_{halves[0]}_{halves[1]}"
    signs = ir.tensor([-1.0] * halves[0] + [1.0] * halves[1], dtype=factor.dtype)
    held = ir.Value(name=name, shape=ir.Shape([sum(halves)]), type=factor.type, const_value=signs)
    graph.register_initializer(held)
    return Adder(graph, product, name)("Mul", [factor, held], factor, "folded")
