"""The dimension of each value that lies along the rows at the cut, followed through operations.

Index p of a value reads rows ``p + low .. p + high`` of the cut, or of more. Convolutions shift and
widen this; a value whose length is the cut's again and whose index p reads row p has its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name, takes
from .convolutions import is_transposed, options_of, per_axis
from .map_layout import moved_order
from .spatial import padding_along


@dataclass(frozen=True)
class Along:
    """last: how many positions from the end of a line were taken out (logits_to_keep); None: all."""

    dim: int
    low: int = 0
    high: int = 0
    last: int | None = None


class Lost(Exception):
    """Rows cannot be followed; the message says why."""


LineRows = dict[fx.Node, Along | str]


def line_rows(nodes: Iterable[fx.Node], cut: fx.Node, dim: int = 1) -> LineRows:
    """For values that are followed: the dimension along the rows of `cut` (B, S, D), or along
    another dimension of it, or why its positions are not the rows. Values made by other operations
    are left out."""
    found: LineRows = {cut: Along(dim)}
    for node in nodes:
        sources = [n for n in node.all_input_nodes if n in found]
        if not sources or node.op != "call_function":
            continue
        try:
            made = _follow(node, sources, found)
        except Lost as error:
            found[node] = str(error)
            continue
        if made is not None:
            found[node] = made
    return found


def has_rows(node: fx.Node, found: Along, cut: fx.Node) -> bool:
    """Whether index p along the dimension belongs to row p."""
    if found.last is not None:
        return False
    lengths = value(node).shape[found.dim], value(cut).shape[1]
    return expression(lengths[0]) == expression(lengths[1]) and found.low <= 0 <= found.high


def _follow(node: fx.Node, sources: list[fx.Node], found: LineRows) -> Along | str | None:
    kind = op(node).positions
    pointwise = kind in ("pointwise", "map", "norm") or is_pointwise(node)
    if pointwise and kind != "features":
        return _joined(node, sources, found)
    known = found.get(first(node)) if isinstance(first(node), fx.Node) else None
    if kind == "cat":
        known = _same([found[s] for s in sources])
    if not isinstance(known, Along):
        return known
    joins = (
        kind in ("cat", "pad", "slice") or op(node).product == "filter" or "pool1d" in op_name(node)
    )
    if known.last is not None and joins:
        raise Lost(f"{node.name} ({op_name(node)}) works on the last positions alone")
    if node.target is operator.getitem:
        return known
    if op(node).transposes:
        return replace(known, dim=moved_order(node).index(known.dim))
    if op(node).product:
        return _product(node, known)
    if kind in ("features", "softmax", "split", "cat", "slice", "pad") or op(node).along:
        return _along(node, known, cut=next(iter(found)))
    if op_name(node) in ("max_pool1d", "avg_pool1d"):
        return _pooled(node, known)
    if op(node).view:
        return _viewed(node, known)
    attends = op_name(node) == "scaled_dot_product_attention"
    return known if attends and known.dim == value(node).ndim - 2 else None


def _joined(node: fx.Node, sources: list[fx.Node], found: LineRows) -> Along | str | None:
    """Operands are matched from the last dimension; one that is followed tells for all."""
    ndim = value(node).ndim
    laid = [
        replace(at, dim=at.dim + ndim - value(s).ndim)
        for s in sources
        if isinstance(at := found[s], Along) and _as_long(s, node, at.dim - value(s).ndim)
    ]
    if laid:
        return _same(laid)
    return next((at for s in sources if isinstance(at := found[s], str)), None)


def _as_long(a: fx.Node, b: fx.Node, dim: int) -> bool:
    return expression(value(a).shape[dim]) == expression(value(b).shape[dim])


def _same(laid: list[Any]) -> Along | str:
    reason = next((at for at in laid if isinstance(at, str)), None)
    if reason is not None:
        return reason
    if len({(at.dim, at.last) for at in laid}) > 1:
        raise Lost(
            "values whose positions lie along different dimensions, or parts of it, are joined"
        )
    low, high = min(at.low for at in laid), max(at.high for at in laid)
    return Along(laid[0].dim, low, high, laid[0].last)


def _product(node: fx.Node, known: Along) -> Along | str | None:
    ndim = value(first(node)).ndim
    if op(node).product == "filter":
        return _convolved(node, known)
    if known.dim == ndim - 1:
        raise Lost(f"{node.name} ({op_name(node)}) sums over positions")
    plain = op(node).product in ("linear", "matmul") and value(node).ndim == ndim
    return known if plain else None


def _convolved(node: fx.Node, known: Along) -> Along:
    if known.dim != 2 or value(node).ndim != 3:
        raise Lost(f"{node.name} is a convolution along other dimensions than the positions")
    (stride,), padding, (dilation,), *_ = options_of(node)
    reach = dilation * (int(value(argument(node, "weight")).shape[2]) - 1)
    if stride != 1:
        raise Lost(
            f"{node.name} is a convolution with stride {stride}: its positions are not the rows at "
            "the cut"
        )
    if isinstance(padding, str):
        before = reach // 2 if padding == "same" else 0
    else:
        (before,) = padding
    if is_transposed(node):
        before = reach - before
    return Along(2, known.low - before, known.high - before + reach)


def _pooled(node: fx.Node, known: Along) -> Along:
    (kernel,) = per_axis(argument(node, "kernel_size"), 1)
    (stride,) = per_axis(argument(node, "stride") or kernel, 1)
    (before,) = per_axis(argument(node, "padding"), 1)
    dilation = per_axis(argument(node, "dilation"), 1)[0] if takes(node, "dilation") else 1
    if known.dim != 2 or stride != 1:
        raise Lost(
            f"{node.name} ({op_name(node)}) pools positions with stride {stride}: they are not the "
            "rows at the cut"
        )
    return Along(2, known.low - before, known.high - before + dilation * (kernel - 1))


def _along(node: fx.Node, known: Along, cut: fx.Node) -> Along:
    """Operations along one dimension, which keep positions if it is another one."""
    kind = op(node).positions
    if kind == "features":
        if known.dim == value(node).ndim - 1:
            raise Lost(f"{node.name} ({op_name(node)}) works along positions")
        return known
    if kind == "pad":
        low, _ = padding_along(node, known.dim)
        return replace(known, low=known.low - low, high=known.high - low)
    dim = argument(node, "dim") % value(first_tensor(node)).ndim
    if dim != known.dim or kind == "softmax":
        return known
    start, step = (argument(node, n) if takes(node, n) else None for n in ("start", "step"))
    if kind == "slice" and has_rows(first(node), known, cut):
        last = _taken_from_end(node, dim, start, step)
        if last is not None:
            return replace(known, last=last)
    if kind != "slice" or step != 1 or not isinstance(start or 0, int) or (start or 0) < 0:
        raise Lost(f"{node.name} ({op_name(node)}) takes apart or joins positions")
    return replace(known, low=known.low + (start or 0), high=known.high + (start or 0))


def _taken_from_end(node: fx.Node, dim: int, start: Any, step: Any) -> int | None:
    """n of a slice ``[-n:]`` along a dimension that has n positions or more."""
    if type(start) is not int or start >= 0 or step != 1:
        return None
    end, length = argument(node, "end"), value(node).shape[dim]
    whole = end is None or (type(end) is int and end > 1 << 40)
    return -start if whole and expression(length) == -start else None


def first_tensor(node: fx.Node) -> fx.Node:
    """The first operand, or the first of a list of them."""
    given = first(node)
    return given[0] if isinstance(given, (list, tuple)) else given


def _viewed(node: fx.Node, known: Along) -> Along | None:
    before, after = (tuple(map(expression, value(n).shape)) for n in (first(node), node))
    kept = before[: known.dim + 1] == after[: known.dim + 1]
    return known if kept and isinstance(value(node), torch.Tensor) else None
