"""Which dimensions of a value are the rows and columns of a feature map, followed through a graph.

An operation keeps positions where each output position depends on a window of input positions
around it, the same everywhere: convolutions, pooling with a window, everything pointwise or over
channels alone. What mixes all positions, or is not known, ends the following with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.aten import op_name, value
from .flops import hint


@dataclass(frozen=True)
class Place:
    """The dimensions of a value that hold rows, columns and channels; dimension 0 is the batch."""

    rows: int = 2
    cols: int = 3
    channels: int = 1


@dataclass(frozen=True)
class Window:
    """What output position r reads along one axis: ``r * stride - padding + dilation * t`` for t
    in 0 .. kernel - 1. Positions outside the input count as `fill`."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    fill: float = 0.0

    def length(self, given: int) -> int:
        """Outputs along an axis of `given` inputs, with as much padding behind as before."""
        return (given + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


class Mixes(Exception):
    """An operation that does not keep positions; the message says why."""


Places = dict[fx.Node, Place | str]
Known = Mapping[fx.Node, Place | str]
NCHW = Place()
POINTWISE_TOO = {
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "_to_copy", "detach", "alias",
    "lift_fresh_copy", "hardswish", "mish", "hardsigmoid", "selu", "celu", "relu6", "softsign",
    "log_sigmoid", "tanhshrink", "rrelu",
}  # fmt: skip
ALL_POSITIONS = {
    "mean", "sum", "amax", "adaptive_avg_pool2d", "adaptive_max_pool2d", "flatten", "view",
    "reshape", "scaled_dot_product_attention", "group_norm", "instance_norm", "matmul", "bmm",
}  # fmt: skip


def follow(nodes: Iterable[fx.Node], entry: fx.Node) -> Places:
    """The place of every node that depends on `entry`, a (B, C, H, W) map, or the reason why it
    cannot be computed patch by patch. Nodes that do not depend on it are left out."""
    places: Places = {entry: NCHW}
    for node in nodes:
        sources = [n for n in node.all_input_nodes if n in places]
        if not sources or node.op != "call_function" or node is entry:
            continue
        lost = next((r for n in sources if isinstance(r := places[n], str)), None)
        try:
            places[node] = lost if lost is not None else _place(node, places, apart=True)
        except Mixes as error:
            places[node] = str(error)
    return places


def maps(nodes: Iterable[fx.Node], entry: fx.Node) -> dict[fx.Node, Place]:
    """The place of every map over `entry`'s positions, whatever else goes into its values."""
    places: dict[fx.Node, Place] = {entry: NCHW}
    for node in nodes:
        if node.op == "call_function" and any(n in places for n in node.all_input_nodes):
            try:
                places[node] = _place(node, places, apart=False)
            except Mixes:
                continue
    return places


def _place(node: fx.Node, places: Known, apart: bool) -> Place:
    """apart: all that goes into a position must come from its window."""
    name = op_name(node).removesuffix("_")
    rule = RULES.get(name)
    if rule is not None:
        return rule(node, places)
    pointwise = name in POINTWISE_TOO or torch.Tag.pointwise in getattr(node.target, "tags", ())
    normalized = not apart and name in ("group_norm", "instance_norm")
    if pointwise or normalized or node.target is operator.getitem:
        return _pointwise(node, places, apart)
    if name in ALL_POSITIONS:
        raise Mixes(f"{node.name} ({name}) mixes all positions")
    raise Mixes(f"{node.name} ({name}) is not known to keep positions")


def _of(node: Any, places: Known) -> Place:
    found = places.get(node)
    if not isinstance(found, Place):
        raise Mixes(f"{node} is not a feature map of this region")
    return found


def _pointwise(node: fx.Node, places: Known, apart: bool) -> Place:
    """All maps lie alike; other operands have one value for all positions, where that counts."""
    found: Place | None = None
    for source in node.all_input_nodes:
        if source in places:
            place = _of(source, places)
            if found not in (None, place):
                raise Mixes(f"{node.name} joins maps whose dimensions lie differently")
            found = place
    assert found is not None
    out = value(node)
    if apart and isinstance(out, torch.Tensor):
        for source in node.all_input_nodes:
            if source not in places:
                _require_same_everywhere(node, value(source), found, out.ndim)
    return found


def _require_same_everywhere(node: fx.Node, operand: Any, place: Place, ndim: int) -> None:
    for dim in (place.rows, place.cols):
        at = dim - ndim + operand.ndim  # dimensions are matched from the last one
        if at >= 0 and operand.shape[at] != 1:
            raise Mixes(f"{node.name} reads a value of its own for each position")


def _conv(node: fx.Node, places: Known) -> Place:
    if op_name(node) == "convolution" and node.args[6]:
        raise Mixes(f"{node.name} is a transposed convolution")
    return _nchw(node, places)


def _nchw(node: fx.Node, places: Known) -> Place:
    if _of(node.args[0], places) != NCHW or value(node.args[0]).ndim != 4:
        raise Mixes(f"{node.name} works on a map whose dimensions were moved")
    others = [n for n in node.all_input_nodes[1:] if n in places]
    if others:
        raise Mixes(f"{node.name} takes a weight computed from the map")
    return NCHW


def _pool(node: fx.Node, places: Known) -> Place:
    ceil_mode = (5, 4)[op_name(node) == "avg_pool2d"]
    if len(node.args) > ceil_mode and node.args[ceil_mode]:
        raise Mixes(f"{node.name} pools with ceil_mode=True")
    if op_name(node) == "avg_pool2d":
        if len(node.args) > 6 and node.args[6] is not None:
            raise Mixes(f"{node.name} pools with a divisor of its own")
        counts_padding = node.args[5] if len(node.args) > 5 else True
        if not counts_padding and any(w.padding for w in windows(node)):
            raise Mixes(f"{node.name} averages with count_include_pad=False over a padded border")
    return _nchw(node, places)


def _pad(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    if op_name(node) == "pad" and len(node.args) > 2 and node.args[2] != "constant":
        raise Mixes(f"{node.name} pads by {node.args[2]}")
    if len(padding_of(node)) // 2 >= value(node).ndim:
        raise Mixes(f"{node.name} pads the batch")
    return place


def _slice(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    dim = axis(node, 1, 0)
    if dim == 0:
        raise Mixes(f"{node.name} takes a part of the batch")
    if dim in (place.rows, place.cols):
        size = hint(value(node.args[0]).shape[dim])
        end = node.args[3] if len(node.args) > 3 else None
        start = node.args[2] if len(node.args) > 2 else 0
        if (end is not None and end < size) or (start or 0) < 0:  # type: ignore[operator]
            raise Mixes(f"{node.name} takes a part of the map")
    return place


def axis(node: fx.Node, position: int, default: int) -> int:
    """A dimension among a node's arguments, counted from the front."""
    dim: Any = node.args[position] if len(node.args) > position else default
    ndim = value(node.args[0]).ndim if isinstance(node.args[0], fx.Node) else value(node).ndim
    return dim % ndim


def _permuted(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    ndim = value(node).ndim
    order = list(range(ndim))
    if op_name(node) == "permute":
        order = [d % ndim for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (d % ndim for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    if order[0] != 0:
        raise Mixes(f"{node.name} moves the batch")
    return Place(*(order.index(d) for d in (place.rows, place.cols, place.channels)))


def _over_last(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    if len([n for n in node.all_input_nodes if n in places]) > 1:
        raise Mixes(f"{node.name} takes a weight computed from the map")
    last = place.channels == value(node).ndim - 1
    over = node.args[1] if op_name(node) in ("layer_norm", "rms_norm") else [0]
    if not last or len(over) != 1:  # type: ignore[arg-type]
        raise Mixes(f"{node.name} ({op_name(node)}) works along more than channels")
    return place


def _over_channels(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    if axis(node, 1, -1) != place.channels:
        raise Mixes(f"{node.name} ({op_name(node)}) works along positions")
    return place


def _split(node: fx.Node, places: Known) -> Place:
    place = _of(node.args[0], places)
    if axis(node, 2, 0) != place.channels:
        raise Mixes(f"{node.name} splits the map")
    return place


def _cat(node: fx.Node, places: Known) -> Place:
    parts: Any = node.args[0]
    found = {_of(p, places) for p in parts}
    dim = (node.args[1] if len(node.args) > 1 else 0) % value(node).ndim
    if len(found) != 1 or dim != next(iter(found)).channels:
        raise Mixes(f"{node.name} joins maps along something other than channels")
    return found.pop()


RULES: dict[str, Callable[[fx.Node, Known], Place]] = {
    "conv2d": _conv, "convolution": _conv, "batch_norm": _nchw, "prelu": _nchw,
    "max_pool2d": _pool, "avg_pool2d": _pool, "pad": _pad, "constant_pad_nd": _pad,
    "slice": _slice, "permute": _permuted, "transpose": _permuted,
    "linear": _over_last, "layer_norm": _over_last, "rms_norm": _over_last,
    "softmax": _over_channels, "log_softmax": _over_channels, "cat": _cat,
    "chunk": _split, "split": _split, "split_with_sizes": _split,
}  # fmt: skip


def padding_of(node: fx.Node) -> list[int]:
    """(low, high) of a padding node for each dimension, the last one first, as a flat list."""
    return list(node.args[1])  # type: ignore[arg-type]


def windows(node: fx.Node, place: Place = NCHW) -> tuple[Window, Window]:
    """What an output position of this node reads, along rows and along columns.

    place: of its output. Only for nodes that `follow` gives a place.
    """
    name = op_name(node)
    if name in ("conv2d", "convolution"):
        return _conv_windows(node)
    if name in ("max_pool2d", "avg_pool2d"):
        return _pool_windows(node)
    if name in ("pad", "constant_pad_nd"):
        pads = padding_of(node)
        ndim = value(node).ndim

        def low(dim: int) -> int:
            at = 2 * (ndim - 1 - dim)
            return pads[at] if at < len(pads) else 0

        fill: Any = node.args[-1] if len(node.args) > (3 if name == "pad" else 2) else 0.0
        return (
            Window(padding=low(place.rows), fill=fill or 0.0),
            Window(padding=low(place.cols), fill=fill or 0.0),
        )
    if name == "slice":
        dim = axis(node, 1, 0)
        start: Any = node.args[2] if len(node.args) > 2 else 0
        step: Any = node.args[4] if len(node.args) > 4 else 1
        taken = Window(stride=step, padding=-(start or 0))
        return (
            taken if dim == place.rows else Window(),
            taken if dim == place.cols else Window(),
        )
    return Window(), Window()


def pair(given: Any) -> tuple[int, int]:
    """An option of a 2-d operation as (rows, columns)."""
    given = [given] if isinstance(given, int) else list(given)
    return (given[0], given[-1])


def _conv_windows(node: fx.Node) -> tuple[Window, Window]:
    kernel = tuple(int(s) for s in value(node.args[1]).shape[2:])
    options: list[Any] = [1, 0, 1]  # stride, padding, dilation
    given = node.args[3:6]
    options[: len(given)] = given
    stride, dilation = pair(options[0]), pair(options[2])
    if options[1] == "same":
        padding = tuple((d * (k - 1)) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        padding = (0, 0) if options[1] == "valid" else pair(options[1])
    return tuple(  # type: ignore[return-value]
        Window(*one) for one in zip(kernel, stride, padding, dilation, strict=True)
    )


def _pool_windows(node: fx.Node) -> tuple[Window, Window]:
    largest = op_name(node) == "max_pool2d"
    kernel: Any = pair(node.args[1])
    stride = pair(node.args[2]) if len(node.args) > 2 and node.args[2] else kernel
    padding = pair(node.args[3]) if len(node.args) > 3 else (0, 0)
    dilation = pair(node.args[4]) if largest and len(node.args) > 4 else (1, 1)
    fill = float("-inf") if largest else 0.0
    return tuple(  # type: ignore[return-value]
        Window(*one, fill) for one in zip(kernel, stride, padding, dilation, strict=True)
    )
