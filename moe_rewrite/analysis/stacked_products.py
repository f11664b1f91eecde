"""Products with a weight of three dimensions, which a model's own experts share: `bmm`, `matmul` and
`einsum` of values with all of its matrices, or with a matrix that was chosen for each row.

Dimensions go by the letters of an einsum. The weight has a group, an inside that is summed over, and
an outside; where matrices are chosen by an index, its dimensions take the place of the group's.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name, takes
from .map_layout import moved_order
from .static_values import Static

BMM = "zmi,zio->zmo"
RANK = "R"  # the letter that experts' rank has, and no product


@dataclass(frozen=True)
class Stacked:
    """How a product reads a weight (G, ., .).

    rows: the values that it is multiplied with.
    weight: the parameter. transposed: its second dimension is the one that is summed over.
    index: what chooses a matrix for each row; None if all take part.
    given, inside, outside, group, made: letters of the values, of the weight and of the result.
    """

    rows: fx.Node
    weight: fx.Node
    transposed: bool
    index: fx.Node | None
    given: str
    inside: str
    outside: str
    group: str
    made: str


@dataclass(frozen=True)
class RowDims:
    """Where a value has the rows of `source`, whose features come last.

    dims: its dimensions with the row dimensions of `source`, in order.
    take: the index that took the rows of this value from those of `source`; or how often each of
        these is repeated; or None.
    tiled: how often the rows are repeated, one after the other, along that dimension; else 0.
    """

    source: fx.Node
    dims: tuple[int, ...]
    take: fx.Node | int | None = None
    tiled: int = 0


def find_stacked(static: Static, node: fx.Node) -> Stacked | str | None:
    """How a node reads a stacked weight; why that form is not known; None if it reads none."""
    letters = _letters(node)
    reads = [_weight(static, s) for s in node.all_input_nodes]
    if not any(reads):
        return None
    if letters is None:
        return f"{node.target} with a weight of three dimensions (the model's own experts)"
    *operands, made = letters
    (left, a), (right, b) = operands
    for (x, given), (w, taken) in (((left, a), (right, b)), ((right, b), (left, a))):
        found = _weight(static, w)
        if found is not None and x not in static:
            return _stacked(node, x, given, found, taken, str(made))
    return f"{node.target}: both of its operands are weights"


def einsum_letters(node: fx.Node) -> list[Any] | None:
    """((operand, its letters), ..., letters of the result) of an einsum; None if an operand has a
    letter twice. Dimensions under an ellipsis get letters of their own."""
    equation, operands = argument(node, "equation").replace(" ", ""), argument(node, "tensors")
    before, arrow, made = equation.partition("->")
    parts = before.split(",")
    spare = "".join(c for c in string.ascii_uppercase if c not in equation + RANK)
    hidden = [
        value(n).ndim - len(p.replace("...", "")) for n, p in zip(operands, parts, strict=True)
    ]
    most = max((h for h, p in zip(hidden, parts, strict=True) if "..." in p), default=0)
    if RANK in equation or most > len(spare):
        return None
    parts = [p.replace("...", spare[most - h : most]) for h, p in zip(hidden, parts, strict=True)]
    if not arrow:  # letters that occur once, in the order of the alphabet
        once = [c for c in sorted(before.replace(".", "")) if before.count(c) == 1]
        made = "..." + "".join(c for c in once if c != ",")
    made = made.replace("...", spare[:most])
    if any(len(set(p)) < len(p) for p in parts):
        return None
    return [*zip(operands, parts, strict=True), made]


def _letters(node: fx.Node) -> list[Any] | None:
    """((operand, its letters), (operand, its letters), letters of the result)."""
    name = op_name(node)
    if name == "einsum":
        found = einsum_letters(node)
        return found if found is not None and len(found) == 3 else None
    pair = list(node.args[:2])
    if name not in ("bmm", "matmul") or any(value(n).ndim != 3 for n in pair):
        return None
    if expression(value(pair[0]).shape[0]) != expression(value(pair[1]).shape[0]):
        return None
    before, _, made = BMM.partition("->")
    return [*zip(pair, before.split(","), strict=True), made]


Dims = tuple[fx.Node, fx.Node | None, tuple[Any, ...]]


def _weight(static: Static, node: Any) -> Dims | None:
    """(the parameter, the index into its matrices, for each dimension of this value: "g" for the
    group's or an index's, 1 and 2 for the parameter's others)."""
    if not isinstance(node, fx.Node) or not isinstance(value(node), torch.Tensor):
        return None
    if node.op == "placeholder":
        made = value(node)
        stacked = made.ndim == 3 and made.is_floating_point() and static.get(node)
        return (node, None, ("g", 1, 2)) if stacked else None
    if op(node).cast:
        return None  # computed weights are no parameters
    if op(node).transposes:
        found = _weight(static, first(node))
        if found is None:
            return None
        weight, index, dims = found
        return weight, index, tuple(dims[d] for d in moved_order(node))
    if op_name(node) == "index":
        found, indices = _weight(static, first(node)), list(argument(node, "indices"))
        chosen = indices[0] if indices else None
        rest = all(i is None for i in indices[1:])
        if found is None or found[1] is not None or not isinstance(chosen, fx.Node) or not rest:
            return None
        weight, _, dims = found
        if dims[0] != "g" or value(chosen).dtype not in (torch.int64, torch.int32):
            return None
        return weight, chosen, (*("g" for _ in range(value(chosen).ndim)), *dims[1:])
    return None


def _stacked(
    node: fx.Node, x: fx.Node, given: str, found: Dims, taken: str, made: str
) -> Stacked | str:
    weight, index, dims = found
    of = {d: letter for d, letter in zip(dims, taken, strict=True) if d != "g"}
    group = "".join(letter for d, letter in zip(dims, taken, strict=True) if d == "g")
    summed = [d for d, letter in of.items() if letter in given and letter not in made]
    kept = [d for d, letter in of.items() if letter in made and letter not in given]
    if len(summed) != 1 or len(kept) != 1:
        return f"{node.target} with the model's own experts sums over their weights in another way"
    inside, outside = of[summed[0]], of[kept[0]]
    return Stacked(x, weight, summed[0] == 1, index, given, inside, outside, group, made)


Known = Callable[[fx.Node], int]


def rows_of(
    static: Static, node: fx.Node, known: Known, seen: dict[fx.Node, RowDims | None] | None = None
) -> RowDims | None:
    """Where a value has the plan's rows, followed back to a value for which `known` returns how many
    leading dimensions they take, or 0. seen: what was found."""
    seen = {} if seen is None else seen
    if node.op != "call_function" or not isinstance(value(node), torch.Tensor) or node in static:
        return None
    if node not in seen:
        count = known(node)
        seen[node] = RowDims(node, tuple(range(count))) if count else None
        for source in [] if count else _before(static, node):
            before = rows_of(static, source, known, seen)
            if seen[node] is None and before is not None:
                seen[node] = _moved(static, node, source, before)
    return seen[node]


def _before(static: Static, node: fx.Node) -> list[fx.Node]:
    """The operands whose rows a value may have."""
    product = find_stacked(static, node) if op(node).product else None
    if isinstance(product, Stacked):
        return [product.rows]
    if is_pointwise(node):
        ndim, sizes = value(node).ndim, [expression(s) for s in value(node).shape[:-1]]
        alike = [s for s in node.all_input_nodes if _ndim(s) == ndim and s not in static]
        return [s for s in alike if [expression(n) for n in value(s).shape[:-1]] == sizes]
    source = first(node)
    if node.target is operator.getitem:  # a part of what is split
        source = first(source)
    return [source] if isinstance(source, fx.Node) else []


def _ndim(node: fx.Node) -> int:
    return getattr(value(node), "ndim", -1)


def _moved(static: Static, node: fx.Node, source: fx.Node, before: RowDims) -> RowDims | None:
    """The rows of a node's value, from those of the operand that it has them of."""
    name, dims, ndim = op_name(node), before.dims, value(node).ndim
    product = find_stacked(static, node) if op(node).product else None
    if isinstance(product, Stacked):
        letters = [product.given[d] for d in dims]
        if before.tiled or any(letter not in product.made for letter in letters):
            return None
        return _at(before, tuple(product.made.index(letter) for letter in letters))
    if is_pointwise(node):
        return before
    part = first(node) if node.target is operator.getitem else node
    if op(part).positions in ("split", "slice"):
        along = argument(part, "dim") % value(first(part)).ndim
        return None if along in dims else before
    if before.tiled:
        return _untiled(node, before) if op(node).view else None
    if name == "unsqueeze":
        at = argument(node, "dim") % ndim
        return _at(before, tuple(d + (d >= at) for d in dims))
    if name == "squeeze" and isinstance(at := argument(node, "dim"), int):
        at %= ndim + 1
        return None if at in dims else _at(before, tuple(d - (d > at) for d in dims))
    if op(node).transposes:
        order = moved_order(node)
        return _at(before, tuple(order.index(d) for d in dims))
    if name == "expand":
        same = ndim == _ndim(source) and all(_same(node, source, d) for d in dims)
        return before if same else None
    return _repeated(node, source, before)


def _repeated(node: fx.Node, source: fx.Node, before: RowDims) -> RowDims | None:
    """Rows that are repeated as a whole, or taken by an index."""
    if before.dims != (0,) or before.take is not None or _ndim(source) != 2:
        return None
    if op_name(node) == "repeat":
        times = argument(node, "repeats")
        plain = len(times) == 2 and times[1] == 1 and isinstance(times[0], int)
        return RowDims(before.source, (0,), tiled=times[0]) if plain else None
    if op_name(node) == "repeat_interleave" and takes(node, "self"):
        times, along = argument(node, "repeats"), argument(node, "dim")
        each = isinstance(times, int) and along == 0
        return RowDims(before.source, (0,), times) if each else None
    if op_name(node) == "index":
        indices = argument(node, "indices")
        one = len(indices) == 1 and value(indices[0]).ndim == 1
        return RowDims(before.source, (0,), indices[0]) if one else None
    return None


def _untiled(node: fx.Node, before: RowDims) -> RowDims | None:
    shape = value(node).shape
    apart = len(shape) == 3 and shape[0] == before.tiled
    return RowDims(before.source, (1,)) if apart else None


def _at(before: RowDims, dims: tuple[int, ...]) -> RowDims:
    return RowDims(before.source, dims, before.take, before.tiled)


def _same(node: fx.Node, source: fx.Node, dim: int) -> bool:
    return expression(value(node).shape[dim]) == expression(value(source).shape[dim])
