"""Join products with LoRA experts' weights into fewer and larger ones: in a small product, starting
and dividing it among threads takes longer than the arithmetic.

Weights are joined by Concat nodes, which ONNX Runtime folds into one weight when it opens the file;
for a moment it holds both.
"""

from __future__ import annotations

from collections.abc import Container
from math import prod
from typing import Any, NamedTuple

import onnx_ir as ir

from .nodes import Adder, is_op, made_by, only_use, other_input, sizes

SMALL = 2**21  # elements of a weight: for larger ones, joining saves less than 3% of the time


class WeightMatMul(NamedTuple):
    """``node = MatMul(read, Transpose(weight))``, where weight is a matrix and not computed."""

    node: ir.Node
    read: ir.Value
    weight: ir.Value

    @classmethod
    def of(cls, value: ir.Value | None) -> WeightMatMul | None:
        node = made_by(value, "MatMul")
        turn = made_by(node.inputs[1], "Transpose") if node is not None else None
        weight = turn.inputs[0] if turn is not None else None
        if node is None or node.inputs[0] is None or weight is None or weight.shape is None:
            return None
        stored = weight.producer() is None and len(weight.shape) == 2
        return cls(node, node.inputs[0], weight) if stored else None

    @property
    def out(self) -> ir.Value:
        return self.node.outputs[0]


def join_first_products(graph: ir.Graph, experts: Container[str]) -> None:
    """Join all ``(x A) * gates`` with the same x into one product with one multiplication.

    experts: names of their weights; joined ones have one shape, which may be dynamic.
    """
    groups: dict[Any, list[tuple[WeightMatMul, ir.Node]]] = {}
    for product, gating in products(graph, experts, "Mul"):
        gates, shape = other_input(gating, product.out), sizes(product.weight)
        if gates is not None and gates.shape and shape and 1 not in (gates.shape[-1], shape[0]):
            key = id(product.read), id(gates), *shape
            groups.setdefault(key, []).append((product, gating))
    repeated: dict[tuple[int, int], ir.Value] = {}
    for group in groups.values():
        if len(group) > 1:
            _join_first(graph, group, repeated)


def products(
    graph: ir.Graph, experts: Container[str], then: str
) -> list[tuple[WeightMatMul, ir.Node]]:
    """(product with experts' weights, its only user if that is a `then` node), in the order of the
    users."""
    pairs = [
        (WeightMatMul.of(value), node)
        for node in graph
        if is_op(node, then)
        for value in node.inputs
    ]
    return [
        (product, node)
        for product, node in pairs
        if product and product.weight.name in experts and only_use(product.out, then) is node
    ]


def _join_first(
    graph: ir.Graph,
    group: list[tuple[WeightMatMul, ir.Node]],
    repeated: dict[tuple[int, int], ir.Value],
) -> None:
    """repeated: concatenated gates, by (gates, number of copies)."""
    (first, gating), count = group[0], len(group)
    add, gates = Adder(graph, gating, first.out.name), other_input(gating, first.out)
    assert gates is not None
    key = id(gates), count
    if key not in repeated:
        repeated[key] = add("Concat", [gates] * count, gates, "gates", axis=-1)
    turned = _turned(graph, [p.weight for p, _ in group], 0, first.out.name)
    product = add("MatMul", [first.read, turned], first.out, "joined")
    result = add("Mul", [product, repeated[key]], product, "gated")
    split = ir.node("Split", [result], {"axis": -1, "num_outputs": count}, num_outputs=count)
    split.name = f"{first.out.name}.split"
    graph.insert_before(gating, split)
    for (_, own), part in zip(group, split.outputs, strict=True):
        whole = own.outputs[0]
        part.name, part.type, part.shape = whole.name, whole.type, whole.shape
        ir.convenience.replace_all_uses_with(whole, part, replace_graph_outputs=True)


def join_second_products(graph: ir.Graph, experts: Container[str]) -> None:
    """``x W (+ bias) + low B`` -> ``[x, low] [W; B] (+ bias)``, with concatenations."""
    for product, total in products(graph, experts, "Add"):
        rest = other_input(total, product.out)
        if rest is None or only_use(rest, "Add") is not total:
            continue
        biased = made_by(rest, "Add")
        for base in map(WeightMatMul.of, biased.inputs if biased is not None else [rest]):
            if base is None or not _fits(base, product) or base.weight.name in experts:
                continue
            bias = other_input(biased, base.out) if biased is not None else None
            _join_second(graph, total, base, product, bias)
            break


def _fits(base: WeightMatMul, product: WeightMatMul) -> bool:
    """Whether the base product is small and read nowhere else, and both have the same rows."""
    read, low = sizes(base.read), sizes(product.read)
    numbers = [n for n in sizes(base.weight) or () if isinstance(n, int)]
    small = len(numbers) == 2 and prod(numbers) <= SMALL
    alone = only_use(base.out, "Add") is not None
    return small and alone and bool(read and low and read[:-1] == low[:-1])


def _join_second(
    graph: ir.Graph,
    total: ir.Node,
    base: WeightMatMul,
    product: WeightMatMul,
    bias: ir.Value | None,
) -> None:
    old = total.outputs[0]
    add = Adder(graph, total, old.name)
    read = add("Concat", [base.read, product.read], base.read, "read", axis=-1)
    turned = _turned(graph, [base.weight, product.weight], 1, old.name)
    made = add("MatMul", [read, turned], old, "joined")
    if bias is not None:
        made = add("Add", [made, bias], old, "biased")
    made.name, made.shape = old.name, old.shape
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)


def _turned(graph: ir.Graph, weights: list[ir.Value], axis: int, name: str | None) -> ir.Value:
    """Concatenated weights, transposed. The nodes go to the start of the graph: ONNX Runtime runs a
    node's earliest inputs last, so without constant folding few joined weights are in memory."""
    add = Adder(graph, graph[0], name)
    joined = add("Concat", weights, weights[0], "weights", axis=axis)
    return add("Transpose", [joined], joined, "turned", perm=[1, 0])
