"""Where a value has its features: maps over a line (B, channels, length) and maps (B, channels,
height, width) have them second, sequences and channels-last maps last.

The last operation that tells is followed; sizes would not tell.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name, takes

ON_CHANNELS = {
    "batch_norm", "group_norm", "channel_shuffle", "instance_norm", "prelu", "pixel_shuffle", "pixel_unshuffle",
    "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool3d", "avg_pool3d",
    "adaptive_avg_pool3d",
}  # fmt: skip
KEEPING = {"roll", "flip", "cat"}


def is_line_map(node: fx.Node) -> bool:
    """Whether the second dimension of a value of three has the features."""
    return value(node).ndim == 3 and features_at(node) == 1


def is_channels_last(node: fx.Node) -> bool:
    """Whether a value of four or five dimensions is a map whose features come last."""
    ndim = value(node).ndim
    return ndim in (4, 5) and features_at(node) == ndim - 1


def moved_order(node: fx.Node) -> list[int]:
    """The order of the dimensions of a node that permutes them."""
    ndim = value(node).ndim
    if takes(node, "dims"):
        return [d % ndim for d in argument(node, "dims")]
    if takes(node, "destination"):
        return _inserted(node, ndim)
    swapped = (ndim - 2, ndim - 1)
    for names in (("dim0", "dim1"), ("axis0", "axis1")):
        if takes(node, names[0]):
            swapped = argument(node, names[0]) % ndim, argument(node, names[1]) % ndim
    a, b = swapped
    order = list(range(ndim))
    order[a], order[b] = order[b], order[a]
    return order


def _inserted(node: fx.Node, ndim: int) -> list[int]:
    """Of movedim: these dimensions come to lie at those places, the others keep their order."""
    source, to = (argument(node, name) for name in ("source", "destination"))
    pairs = [(source, to)] if isinstance(source, int) else zip(source, to, strict=True)
    placed = {place % ndim: dim % ndim for dim, place in pairs}
    others = iter([d for d in range(ndim) if d not in placed.values()])
    return [placed[d] if d in placed else next(others) for d in range(ndim)]


def features_at(node: fx.Node, seen: set[fx.Node] | None = None) -> int | None:
    """The dimension that has the features, of a value of three or more; None if nothing tells."""
    seen = set() if seen is None else seen
    ndim = getattr(value(node), "ndim", 0)
    if node.op != "call_function" or ndim < 3 or node in seen:
        return None
    seen.add(node)
    of, name = op(node), op_name(node)
    if of.product == "filter" or name in ON_CHANNELS:
        return 1
    if of.positions == "features" or name in ("embedding", "matmul"):
        several = of.normalized and len(argument(node, of.normalized)) > 1
        return None if several else ndim - 1
    if of.view:
        return _through_view(node, seen)
    if of.transposes:
        found = features_at(first(node), seen)
        return None if found is None else moved_order(node).index(found)
    keeps = of.cast or is_pointwise(node) or name in KEEPING or of.positions in ("slice", "pad")
    return _of_sources(node, seen, ndim) if keeps else None


def _of_sources(node: fx.Node, seen: set[fx.Node], ndim: int) -> int | None:
    """What the first operand that tells has. The last one is tried first: of a sum, it is what a
    block adds, whose product is near."""
    sources = [s for s in node.all_input_nodes if getattr(value(s), "ndim", 0) == ndim]
    known = (features_at(s, seen) for s in reversed(sources))
    return next((k for k in known if k is not None), None)


def _through_view(node: fx.Node, seen: set[fx.Node]) -> int | None:
    """A view keeps the last dimension whole if it has as many elements, and the leading ones."""
    source: Any = first(node)
    found = features_at(source, seen)
    if found is None:
        return None
    before, after = (tuple(map(expression, value(n).shape)) for n in (source, node))
    if found == len(before) - 1 and before[-1] == after[-1]:
        return len(after) - 1
    return found if before[: found + 1] == after[: found + 1] else None
