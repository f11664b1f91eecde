"""Products of activations with a weight, in every form that they have in a graph.

These are nn.Linear, addmm with the weight stored as (in, out), matmul or einsum with a bare or
transposed parameter, a tied weight, and convolutions, transposed ones too. A weight may also be computed from parameters and
buffers (normed, standardised, dequantised).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.aten import module_paths, value
from ..ir.ops import argument, first, op, op_name, takes
from ..ir.program import Program
from .convolutions import is_transposed, options_of
from .grouped_products import Sorted, is_grouped, sorted_rows, stacked_weight
from .map_layout import moved_order
from .stacked_products import Stacked, einsum_letters, find_stacked
from .static_values import Static

OF_INPUTS = "the weight is computed from the call's inputs"


@dataclass(frozen=True)
class Product:
    """node = rows times weight.

    weight: a parameter, or what is computed from parameters and buffers alone.
    transposed: the weight is stored as (in, out), as a transposed convolution's is.
    options: of a convolution, as `convolutions.options_of` gives them.
    groups: of a product with the weights of the model's own experts, how its rows are sorted.
    stacked: of one with all of these weights, or with one chosen for each row, its dimensions.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool = False
    options: tuple[Any, ...] = ()
    groups: Sorted | None = None
    stacked: Stacked | None = None

    @property
    def bias(self) -> fx.Node | None:
        """The bias that the node itself adds to the product."""
        name = {"addmm": "self", "linear": "bias"}.get(op_name(self.node))
        if op(self.node).product == "filter":
            name = "bias"
        found = argument(self.node, name) if name else None
        return found if isinstance(found, fx.Node) else None


def is_weight(static: Static, node: Any) -> bool:
    """Whether it is a parameter or a buffer, or a float that is computed from these."""
    made = value(node) if isinstance(node, fx.Node) else None
    return bool(static.get(node)) and isinstance(made, torch.Tensor) and made.is_floating_point()


def weight_name(program: Program, static: Static, product: Product) -> str:
    """State-dict name of the weight; of one that is computed, of the first tensor that it is
    computed from, a float where there is one."""
    owned = static[product.weight]
    floats = [n for n in owned if value(n).is_floating_point()]
    return program.inputs[(floats or owned)[0].name].name


def innermost_module(node: fx.Node) -> str:
    """Path of the innermost module that contains a node; outside all modules, the node's name."""
    paths = module_paths(node)
    return paths[-1][0] if paths else node.name


def find_product(static: Static, node: fx.Node) -> Product | str | None:
    """The product that a node computes; why it cannot be a site; or None if it is no product.

    static: of `static_values`.
    """

    def weight(n: Any) -> bool:
        return isinstance(n, fx.Node) and value(n).ndim == 2 and is_weight(static, n)

    kind = op(node).product
    if is_grouped(node):
        return _grouped(static, node)
    if kind not in ("", "filter") and node not in static:
        found = find_stacked(static, node)
        if isinstance(found, Stacked):
            return Product(node, found.rows, found.weight, found.transposed, stacked=found)
        if found is not None:
            return found
        if any(stacked_weight(static, s) for s in node.all_input_nodes):
            return f"{node.target} with a weight of three dimensions (the model's own experts)"
    if kind == "other":
        if op_name(node) == "einsum" and (product := _einsum(static, node)) is not None:
            return product
        if any(map(weight, node.all_input_nodes)):
            return f"{node.target} with a parameter is not a plain linear map"
        return None
    rows = argument(node, op(node).summed or "input") if kind else None
    if rows in static:  # or a weight times a value, which is no product of rows
        return "its input does not depend on the call" if node in static else None
    if kind == "filter":
        return _convolution(static, node)
    if kind == "linear":
        rows, factor = argument(node, "input"), argument(node, "weight")
        if weight(factor):
            return Product(node, rows, factor)
        return OF_INPUTS
    if kind != "matmul":
        return None
    if any(takes(node, k) and argument(node, k) != 1 for k in ("alpha", "beta")):
        return "addmm with alpha or beta"
    rows = argument(node, op(node).summed)
    factor = argument(node, "other" if takes(node, "other") else "mat2")
    if isinstance(factor, fx.Node) and op(factor).transposes and weight(first(factor)):
        return Product(node, rows, first(factor), transposed=not _swaps(factor))
    return Product(node, rows, factor, transposed=True) if weight(factor) else None


def _einsum(static: Static, node: fx.Node) -> Product | None:
    """An einsum that multiplies the last dimension of rows with a weight, in any notation."""
    letters = einsum_letters(node)
    if letters is None or len(letters) != 3 or node in static:
        return None
    (left, a), (right, b), made = letters
    for rows, given, factor, taken in ((left, a, right, b), (right, b, left, a)):
        if rows in static or not is_weight(static, factor) or len(taken) != 2:
            continue
        for inside, outside in (taken, taken[::-1]):
            if given[-1:] == inside and outside not in given and made == given[:-1] + outside:
                return Product(node, rows, factor, transposed=taken[0] == inside)
    return None


def _swaps(node: fx.Node) -> bool:
    """Whether a transpose node really swaps the two dimensions."""
    return moved_order(node) == [1, 0]


def _grouped(static: Static, node: fx.Node) -> Product | str:
    """rows @ weights, each group of rows with its own."""
    rows, factor = node.all_input_nodes[:2]
    weight, groups = stacked_weight(static, factor), sorted_rows(node)
    if weight is None:
        return OF_INPUTS
    if isinstance(groups, str):
        return groups
    turned = factor is not weight  # (G, out, in), transposed for the product
    if turned and (first(factor) is not weight or not op(factor).transposes):
        return f"{node.target} with a part of a weight"
    return Product(node, rows, weight, transposed=not turned, groups=groups)


def _convolution(static: Static, node: fx.Node) -> Product | str:
    rows, weight = argument(node, "input"), argument(node, "weight")
    if not is_weight(static, weight):
        return OF_INPUTS
    if value(rows).ndim != value(weight).ndim:
        return "a convolution of a single sample, without a batch dimension"
    return Product(node, rows, weight, is_transposed(node), options_of(node))
