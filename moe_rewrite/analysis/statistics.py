"""Operations that compute statistics of each sample over all positions of a map: norms over
groups of channels and positions, and means over all positions."""

from __future__ import annotations

from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, op, op_name, operands
from .places import NCHW, Known, NotLocal, OfSample, Place, SpatialDims

HOW = (
    "RegionExperts(statistics='patches') takes statistics over the patches that an expert took of "
    "a sample instead, which is an approximation"
)


def with_statistics(node: fx.Node, places: Known) -> Place | None:
    """The place of a node that takes statistics over a map, or None for other nodes.

    Raises NotLocal for statistics in a form that is not known.
    """
    source = first(node)
    place = places.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(place, SpatialDims):
        return None
    if is_mean(node, place):
        return OfSample()
    if not is_norm(node):
        return None
    if place != NCHW or sum(n in places for n in operands(node)) > 1:
        raise NotLocal(f"{node.name} ({op_name(node)}) works on a map whose dimensions were moved")
    if op_name(node) == "instance_norm" and argument(node, "running_mean") is not None:
        raise NotLocal(f"{node.name} (instance_norm) keeps running statistics of whole maps")
    return NCHW


def is_norm(node: fx.Node) -> bool:
    """Whether a node normalizes by statistics over positions."""
    of = op(node)
    if of.normalized:
        return op_name(node) == "layer_norm" and len(argument(node, of.normalized)) in (2, 3)
    return of.positions == "norm"


def is_mean(node: fx.Node, place: SpatialDims) -> bool:
    """Whether a node is the mean over all positions of a map."""
    if op_name(node) == "adaptive_avg_pool2d":
        return place == NCHW and [expression(s) for s in value(node).shape[2:]] == [1, 1]
    dims = argument(node, "dim") if op_name(node) == "mean" and len(node.args) > 1 else None
    if not isinstance(dims, (list, tuple)):
        return False
    return {d % value(first(node)).ndim for d in dims} == {place.rows, place.cols}
