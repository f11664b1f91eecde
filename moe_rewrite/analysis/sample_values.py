"""Values that a sample has once (a squeeze of all its positions), and what is computed of them.

An operation keeps samples apart if dimension 0 is the batch before and after it, and no element
depends on another sample's.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, is_pointwise, op, op_name, operands
from ..ir.program import Program
from .map_layout import moved_order
from .places import Known, NotLocal, OfSample, SpatialDims, SpatialMap


def require_kept_apart(node: fx.Node, places: Known) -> None:
    """Raises NotLocal unless a node that reads only values of samples keeps samples apart."""
    of, made = op(node), value(node)
    if of.view:
        kept = made.ndim > 0 and expression(made.shape[0]) == _batch(first(node))
    elif of.transposes:
        kept = moved_order(node)[0] == 0
    elif of.product in ("linear", "filter") or of.positions == "map":
        single = value(argument(node, "weight")).ndim - 1 if of.product == "filter" else 1
        kept = value(first(node)).ndim > single  # a convolution takes a single sample too
        kept = kept and sum(n in places for n in operands(node)) == 1
    elif of.normalized:
        kept = len(argument(node, of.normalized)) < made.ndim
    elif of.positions in ("softmax", "split", "cat", "slice", "gate"):
        source = first(node) if isinstance(first(node), fx.Node) else node
        kept = argument(node, "dim") % value(source).ndim != 0
    else:
        pointwise = is_pointwise(node) or node.target is operator.getitem
        kept = pointwise and all(_alike(node, n, n in places) for n in node.all_input_nodes)
    if not kept:
        raise NotLocal(f"{node.name} ({op_name(node)}) is not known to keep samples apart")


def _alike(node: fx.Node, operand: fx.Node, of_sample: bool) -> bool:
    """Whether an operand of a pointwise node is matched with the samples, or is for all of them."""
    given, made = value(operand), value(node)
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor):
        return True
    if of_sample:
        return given.ndim == made.ndim
    return given.ndim < made.ndim or expression(given.shape[0]) == 1


def require_spread(node: fx.Node, operand: fx.Node, place: SpatialDims) -> None:
    """Raises NotLocal unless a value of each sample is the same for all positions of a map."""
    given, made = value(operand), value(node)
    one = given.ndim == made.ndim and all(
        expression(given.shape[dim]) == 1 for dim in (place.rows, place.cols)
    )
    if not one:
        raise NotLocal(f"{node.name} joins a map and {operand.name}, which is no gate of channels")


def _batch(node: fx.Node) -> object:
    return expression(value(node).shape[0])


def free_of_sizes(program: Program, places: SpatialMap) -> None:
    """Let values of samples be computed for any number of samples, without the batch's size.

    A view with that size takes -1 there; a value that is expanded to a map, for an operation that
    has another operand of the map's size, is left to be broadcast. The same values. The graph is
    edited.
    """
    for node in list(program.graph.nodes):
        source = first(node) if node.op == "call_function" else None
        if not isinstance(source, fx.Node) or not isinstance(places.get(source), OfSample):
            continue
        if op(node).view and op_name(node) in ("view", "reshape", "_unsafe_view"):
            _, sizes = node.args
            given = list(sizes) if isinstance(sizes, (list, tuple)) else []
            if given and isinstance(given[0], fx.Node) and _batch(node) == _batch(source):
                node.args = (source, [-1, *given[1:]])
        elif op_name(node) in ("expand", "expand_as") and value(source).ndim == value(node).ndim:
            for user in list(node.users):
                if is_pointwise(user) and _has_size(user, node):
                    user.replace_input_with(node, source)
            if not node.users:
                program.graph.erase_node(node)


def _has_size(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operand of `user` besides `node` has its size, which is also the result's."""
    size = [expression(s) for s in value(node).shape]
    others = [value(n) for n in user.all_input_nodes if n is not node]
    shapes = [[expression(s) for s in v.shape] for v in others if isinstance(v, torch.Tensor)]
    return size in shapes and [expression(s) for s in value(user).shape] == size
