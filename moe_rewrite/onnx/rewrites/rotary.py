"""Rotary embeddings: move the negation of rotated features into the sines, which layers share."""

from __future__ import annotations

import onnx_ir as ir

from .nodes import Adder, is_op, made_by, only_use, other_input, sizes


def fold_signs(graph: ir.Graph) -> None:
    """``Concat(Neg(a), b) * s`` -> ``Concat(a, b) * (s * signs)``, bit for bit, with one
    ``s * signs`` for all products with `s`."""
    signed: dict[tuple[int, int, int], ir.Value] = {}
    for product in [node for node in graph if is_op(node, "Mul")]:
        for value in product.inputs:
            turned = made_by(value, "Concat")
            if value is None or turned is None or only_use(value, "Mul") is not product:
                continue
            factor, halves = other_input(product, value), _halves(turned)
            negated = made_by(turned.inputs[0], "Neg")
            if factor is None or factor.dtype is None or halves is None or negated is None:
                continue
            key = id(factor), *halves
            if key not in signed:
                signed[key] = _signed(graph, product, factor, halves)
            turned.replace_input_with(0, negated.inputs[0])
            product.replace_input_with(0, value)
            product.replace_input_with(1, signed[key])
            break


def _halves(joined: ir.Node) -> tuple[int, int] | None:
    """(features of a, features of b) if this is a Concat of two along the last dimension."""
    shapes = [sizes(value) for value in joined.inputs]
    if len(shapes) != 2 or not (shapes[0] and shapes[1]):
        return None
    if joined.attributes["axis"].as_int() not in (-1, len(shapes[0]) - 1):
        return None
    first, second = shapes[0][-1], shapes[1][-1]
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def _signed(
    graph: ir.Graph, product: ir.Node, factor: ir.Value, halves: tuple[int, int]
) -> ir.Value:
    """``factor * signs``, inserted before the first product that reads it."""
    name = f"{factor.name}.signs_{halves[0]}_{halves[1]}"
    signs = ir.tensor([-1.0] * halves[0] + [1.0] * halves[1], dtype=factor.dtype)
    held = ir.Value(name=name, shape=ir.Shape([sum(halves)]), type=factor.type, const_value=signs)
    graph.register_initializer(held)
    return Adder(graph, product, name)("Mul", [factor, held], factor, "folded")
