"""The window of positions that each output position of an operation on a map reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..ir.aten import value
from ..ir.ops import argument, op, op_name, takes
from .convolutions import per_axis
from .places import NCHW, SpatialDims
from .spatial import axis, padding_along


@dataclass(frozen=True)
class Window:
    """The input positions that output position r reads along one axis: ``r * stride - padding +
    dilation * t`` for t in 0 .. kernel - 1. Positions outside the input have the value `fill`."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    fill: float = 0.0

    def length(self, given: int) -> int:
        """Output positions along an axis of `given` ones, with equal padding at both ends."""
        return (given + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


def windows(node: fx.Node, place: SpatialDims = NCHW) -> tuple[Window, Window]:
    """The windows of input that an output position of this node reads, along rows and columns.

    place: spatial dimensions of its output. Only for nodes for which `propagate` returns them.
    """
    of = WINDOWS.get(op(node).positions)
    return of(node, place) if of is not None else (Window(), Window())


def _pad_windows(node: fx.Node, place: SpatialDims) -> tuple[Window, Window]:
    fill = argument(node, "value") or 0.0
    (top, _), (left, _) = (padding_along(node, dim) for dim in (place.rows, place.cols))
    return Window(padding=top, fill=fill), Window(padding=left, fill=fill)


def _slice_windows(node: fx.Node, place: SpatialDims) -> tuple[Window, Window]:
    dim, start = axis(node), argument(node, "start") or 0
    taken = Window(stride=argument(node, "step"), padding=-start)
    return (
        taken if dim == place.rows else Window(),
        taken if dim == place.cols else Window(),
    )


def _conv_windows(node: fx.Node, place: SpatialDims) -> tuple[Window, Window]:
    kernel = tuple(int(s) for s in value(argument(node, "weight")).shape[2:])
    stride, dilation = (per_axis(argument(node, n), 2) for n in ("stride", "dilation"))
    padding = argument(node, "padding")
    if padding == "same":
        padding = [(d * (k - 1)) // 2 for k, d in zip(kernel, dilation, strict=True)]
    else:
        padding = [0, 0] if padding == "valid" else per_axis(padding, 2)
    return tuple(  # type: ignore[return-value]
        Window(*one) for one in zip(kernel, stride, padding, dilation, strict=True)
    )


def _pool_windows(node: fx.Node, place: SpatialDims) -> tuple[Window, Window]:
    kernel, padding = (per_axis(argument(node, n), 2) for n in ("kernel_size", "padding"))
    stride = per_axis(argument(node, "stride") or kernel, 2)
    dilation = per_axis(argument(node, "dilation"), 2) if takes(node, "dilation") else [1, 1]
    fill = float("-inf") if op_name(node) == "max_pool2d" else 0.0
    return tuple(  # type: ignore[return-value]
        Window(*one, fill) for one in zip(kernel, stride, padding, dilation, strict=True)
    )


WINDOWS: dict[str, Callable[[fx.Node, SpatialDims], tuple[Window, Window]]] = {
    "convolution": _conv_windows, "pool": _pool_windows, "pad": _pad_windows,
    "slice": _slice_windows,
}  # fmt: skip
