"""Which dimensions of a value are rows and columns of a feature map, propagated through a graph.

An operation keeps positions if each output position depends on a window of input positions around
it, the same everywhere: convolutions, windowed pooling, everything pointwise or over channels only.
Operations that mix all positions, or are unknown, end the propagation with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name, operands, takes
from .convolutions import is_transposed, per_axis
from .flops import hint
from .map_layout import moved_order
from .places import NCHW, Known, NotLocal, OfSample, SpatialDims, SpatialMap
from .sample_values import require_kept_apart, require_spread
from .statistics import with_statistics


def propagate(nodes: Iterable[fx.Node], entry: fx.Node, statistics: bool = False) -> SpatialMap:
    """For every node that depends on `entry`, a (B, C, H, W) map: its spatial dimensions, or why it
    cannot be computed patch by patch.

    statistics: statistics over positions may be taken over some patches, and their sizes be read.
    """
    places: SpatialMap = {entry: NCHW}
    for node in nodes:
        sources = [n for n in node.all_input_nodes if n in places]
        if not sources or node.op != "call_function" or node is entry:
            continue
        if statistics and op_name(node) == "sym_size":
            continue
        lost = next((r for n in sources if isinstance(r := places[n], str)), None)
        try:
            if lost is not None:
                places[node] = lost
                continue
            taken = with_statistics(node, places) if statistics else None
            places[node] = taken or _place(node, places, apart=True)
        except NotLocal as error:
            places[node] = str(error)
    return places


def maps(
    nodes: Iterable[fx.Node], entry: fx.Node
) -> tuple[dict[fx.Node, SpatialDims], dict[fx.Node, str]]:
    """The spatial dimensions of every map over `entry`'s positions, even if an element depends on
    more than a window; and for other values that are made of such maps, why they are none."""
    places: dict[fx.Node, SpatialDims] = {entry: NCHW}
    lost: dict[fx.Node, str] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        if any(n in places for n in node.all_input_nodes):
            try:
                places[node] = _place(node, places, apart=False)
            except NotLocal as error:
                lost[node] = str(error)
        else:
            reason = next((lost[n] for n in node.all_input_nodes if n in lost), None)
            if reason is not None:
                lost[node] = reason
    return places, lost


def _place(node: fx.Node, places: Known, apart: bool) -> Any:
    """The place of a node. apart: a position may depend on its window only."""
    kind, name = op(node).positions, op_name(node)
    found = [places[n] for n in node.all_input_nodes if n in places]
    if found and all(isinstance(p, OfSample) for p in found):
        require_kept_apart(node, places)
        return OfSample()
    if kind in RULES:
        if apart and kind in APART:
            APART[kind](node)
        return RULES[kind](node, places)
    pointwise = kind == "pointwise" or is_pointwise(node) or node.target is operator.getitem
    if pointwise or (kind == "norm" and not apart):
        return _pointwise(node, places, apart)
    if kind in ("all", "norm"):
        raise NotLocal(f"{node.name} ({name}) mixes all positions")
    raise NotLocal(f"{node.name} ({name}) is not known to keep positions")


def _of(node: Any, places: Known) -> SpatialDims:
    found = places.get(node)
    if not isinstance(found, SpatialDims):
        raise NotLocal(f"{node} is not a feature map of this region")
    return found


def _pointwise(node: fx.Node, places: Known, apart: bool) -> SpatialDims:
    """All maps have the same dimensions; with `apart`, they have the same size, and other operands
    do not vary by position."""
    read = [n for n in node.all_input_nodes if n in places]
    found = {_of(n, places) for n in read if not isinstance(places[n], OfSample)}
    if len(found) != 1:
        raise NotLocal(f"{node.name} joins maps with different orders of dimensions")
    (place,), out = found, value(node)
    for source in node.all_input_nodes:
        operand = value(source)
        if not isinstance(out, torch.Tensor) or not isinstance(operand, torch.Tensor):
            continue
        if isinstance(places.get(source), OfSample):
            require_spread(node, source, place)
            continue
        if source in places and operand.ndim != out.ndim:
            raise NotLocal(f"{node.name} adds dimensions to the map {source.name}")
        if apart and source in places:
            _require_same_size(node, source, place)
        elif apart:
            _require_same_everywhere(node, operand, place, out.ndim)
    return place


def _require_same_size(node: fx.Node, source: fx.Node, place: SpatialDims) -> None:
    """A smaller map would be broadcast: every position would read the same one of it."""
    for dim in (place.rows, place.cols):
        if expression(value(source).shape[dim]) != expression(value(node).shape[dim]):
            raise NotLocal(f"{node.name} spreads the smaller map {source.name} over all positions")


def _require_same_everywhere(
    node: fx.Node, operand: torch.Tensor, place: SpatialDims, ndim: int
) -> None:
    for dim in (place.rows, place.cols):
        at = dim - ndim + operand.ndim  # dimensions are matched from the last one
        if at >= 0 and expression(operand.shape[at]) != 1:
            raise NotLocal(f"{node.name} reads an operand that varies by position")


def _conv(node: fx.Node, places: Known) -> SpatialDims:
    """A transposed convolution too, if its output is exactly `stride` times its input: patches that
    are laid over the output then cover what was made of them."""
    place = _nchw(node, places)
    if is_transposed(node):
        stride = per_axis(argument(node, "stride"), 2)
        given, made = ([*value(n).shape[2:]] for n in (first(node), node))
        wanted = [n * s for n, s in zip(given, stride, strict=True)]
        if [*map(expression, wanted)] != [*map(expression, made)]:
            raise NotLocal(
                f"{node.name} is a transposed convolution that makes {_by(made)} positions of "
                f"{_by(given)} with stride {stride}: which patches they belong to cannot be told "
                "unless they are stride times as many (choose its padding and output_padding so)"
            )
    return place


def _by(sizes: list[Any]) -> str:
    return "x".join(map(str, sizes))


def _require_plain_conv(node: fx.Node) -> None:
    if is_transposed(node):
        raise NotLocal(f"{node.name} is a transposed convolution")


def _nchw(node: fx.Node, places: Known) -> SpatialDims:
    if _of(first(node), places) != NCHW or value(first(node)).ndim != 4:
        raise NotLocal(f"{node.name} works on a map whose dimensions were moved")
    _require_weights(node, places)
    return NCHW


def _require_weights(node: fx.Node, places: Known) -> None:
    """Of all operands, only the first is a map."""
    if sum(n in places for n in operands(node)) > 1:
        raise NotLocal(f"{node.name} takes a weight computed from the map")


def _require_plain_pool(node: fx.Node) -> None:
    """Windows that all lie in the map, or count what pads it."""
    if argument(node, "ceil_mode"):
        raise NotLocal(f"{node.name} pools with ceil_mode=True")
    if op_name(node) == "avg_pool2d":
        if argument(node, "divisor_override") is not None:
            raise NotLocal(f"{node.name} pools with divisor_override")
        if not argument(node, "count_include_pad") and any(per_axis(argument(node, "padding"), 2)):
            raise NotLocal(
                f"{node.name} averages with count_include_pad=False over a padded border"
            )


def _require_constant_pad(node: fx.Node) -> None:
    if takes(node, "mode") and argument(node, "mode") != "constant":
        raise NotLocal(f"{node.name} pads by {argument(node, 'mode')}")


def _pad(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    if len(padding_of(node)) // 2 >= value(node).ndim:
        raise NotLocal(f"{node.name} pads the batch")
    return place


def _slice(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    dim = axis(node)
    if dim == 0:
        raise NotLocal(f"{node.name} takes a part of the batch")
    if dim in (place.rows, place.cols):
        size = hint(value(first(node)).shape[dim])
        start, end = argument(node, "start"), argument(node, "end")
        if (end is not None and end < size) or (start or 0) < 0:
            raise NotLocal(f"{node.name} takes a part of the map")
    return place


def axis(node: fx.Node) -> int:
    """The dimension that a node works along, as a nonnegative index."""
    ndim = value(first(node) if isinstance(first(node), fx.Node) else node).ndim
    return argument(node, "dim") % ndim


def _permuted(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    order = moved_order(node)
    if order[0] != 0:
        raise NotLocal(f"{node.name} moves the batch")
    return SpatialDims(*(order.index(d) for d in (place.rows, place.cols, place.channels)))


def _over_last(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    _require_weights(node, places)
    last = place.channels == value(node).ndim - 1
    normalized = op(node).normalized
    if not last or (normalized and len(argument(node, normalized)) != 1):
        raise NotLocal(f"{node.name} ({op_name(node)}) works along more than channels")
    return place


def _over_channels(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    if axis(node) != place.channels:
        raise NotLocal(f"{node.name} ({op_name(node)}) works along positions")
    return place


def _split(node: fx.Node, places: Known) -> SpatialDims:
    place = _of(first(node), places)
    if axis(node) != place.channels:
        raise NotLocal(f"{node.name} splits the map")
    return place


def _cat(node: fx.Node, places: Known) -> SpatialDims:
    found = {_of(part, places) for part in argument(node, "tensors")}
    if len(found) != 1 or axis(node) != next(iter(found)).channels:
        raise NotLocal(f"{node.name} joins maps along something other than channels")
    return found.pop()


def _require_own_statistics(node: fx.Node) -> None:
    if op_name(node) == "batch_norm" and argument(node, "running_mean") is None:
        raise NotLocal(
            f"{node.name} (batch_norm) normalizes by the statistics of the whole batch in evaluation "
            "too: keep running ones (track_running_stats=True)"
        )


RULES: dict[str, Callable[[fx.Node, Known], SpatialDims]] = {
    "convolution": _conv, "map": _nchw, "pool": _nchw, "pad": _pad, "slice": _slice,
    "permute": _permuted, "features": _over_last, "softmax": _over_channels, "split": _split,
    "cat": _cat, "gate": _split, "shuffle": _nchw,
}  # fmt: skip
# what must hold besides if a position may depend on its window only
APART: dict[str, Callable[[fx.Node], None]] = {
    "convolution": _require_plain_conv, "pool": _require_plain_pool, "pad": _require_constant_pad,
    "map": _require_own_statistics,
}  # fmt: skip


def padding_of(node: fx.Node) -> list[int]:
    """(low, high) of a padding node for each dimension, the last one first, as a flat list."""
    return list(argument(node, "pad"))


def padding_along(node: fx.Node, dim: int) -> tuple[int, int]:
    """(low, high) of a padding node along one dimension."""
    pads, at = padding_of(node), 2 * (value(node).ndim - 1 - dim)
    return (pads[at], pads[at + 1]) if at < len(pads) else (0, 0)
