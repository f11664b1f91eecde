"""Products with the weights of a model's own experts: rows sorted by expert, each group of rows
times its expert's weight, as transformers' models that route already have them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name
from .static_values import Static

GROUPED = {"grouped_mm_fallback", "_grouped_mm"}  # (rows, weights (G, I, O), ends of the groups)


@dataclass(frozen=True)
class Sorted:
    """Rows that were taken from `source` by `index`, sorted into groups that end at `ends`."""

    source: fx.Node
    index: fx.Node
    ends: fx.Node


def is_grouped(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in GROUPED


def sorted_rows(node: fx.Node) -> Sorted | str:
    """Where the rows of a grouped product come from, or why that is not known."""
    given: list[Any] = [*node.args, None]
    rows, ends = given[0], given[2]
    found = _taken(rows)
    if found is None or not isinstance(ends, fx.Node):
        return "the rows of the model's own experts are sorted in a way that is not followed"
    return Sorted(*found, ends)


def _taken(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(the rows, the index that takes from them), back over work on each row."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) == "index":
            indices: Any = argument(node, "indices")
            plain = len(indices) == 1 and value(first(node)).ndim == 2
            return (first(node), indices[0]) if plain and value(indices[0]).ndim == 1 else None
        before = _of_rows(node)
        if before is None:
            return None
        node = before
    return None


def _of_rows(node: fx.Node) -> fx.Node | None:
    """The operand whose rows the value has; every row is worked on by itself."""
    if node.target is operator.getitem or is_grouped(node):
        return first(node)
    if op(node).positions == "split":
        return first(node) if argument(node, "dim") % value(first(node)).ndim else None
    if not is_pointwise(node):
        return None
    made = value(node)
    alike = [s for s in node.all_input_nodes if _as_long(value(s), made)]
    return alike[0] if alike else None


def _as_long(given: Any, made: torch.Tensor) -> bool:
    if not isinstance(given, torch.Tensor) or given.ndim != made.ndim:
        return False
    return expression(given.shape[0]) == expression(made.shape[0])


def stacked_weight(static: Static, node: Any) -> fx.Node | None:
    """The parameter (G, ., .) that a value is: itself, transposed, or rows of it; else None."""
    while isinstance(node, fx.Node) and (op(node).transposes or op_name(node) == "index"):
        node = first(node)
    made = value(node) if isinstance(node, fx.Node) else None
    owned = isinstance(made, torch.Tensor) and made.ndim == 3 and made.is_floating_point()
    return node if owned and static.get(node) else None
