"""What operators do, written once; their arguments by name. No other file knows an argument's place.

An operator goes by its name without namespace, overload and trailing underscore: what is done in
place is done all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

Positions = Literal[
    "", "pointwise", "convolution", "map", "pool", "pad", "slice", "permute", "features", "softmax",
    "split", "cat", "norm", "all",
]  # fmt: skip


@dataclass(frozen=True)
class Op:
    """What one operator does. Of what nothing is said, nothing is known.

    pointwise: an element of the result depends on the elements at its place alone.
    rows: leading dimensions are ``"kept"``, or ``"merged"``: reshaped with their order kept.
    positions: what becomes of a map's rows and columns; see `analysis.spatial`.
    channels: each stays what it is.
    sizes_only: takes only sizes and dtype of its argument.
    cast: the same values, perhaps in another dtype, device or memory format.
    check: computes nothing, it only raises.
    view: the same elements under another shape.
    along: the name of the dimension that it takes parts along.
    normalized: the name of the sizes that it normalizes over.
    transposes: moves dimensions, and nothing else.
    evaluation: what arguments are when a model is in evaluation.
    statistics: a flag, and what is written while it is true although the schema does not say so.
    product: ``"linear"`` by a weight (out, in), ``"matmul"`` by one (in, out), ``"filter"`` of a
        convolution, or ``"other"``. summed: the operand whose last dimension is summed over.
    fresh: its result is nobody else's.
    """

    pointwise: bool = False
    rows: Literal["", "kept", "merged"] = ""
    positions: Positions = ""
    channels: bool = False
    sizes_only: bool = False
    cast: bool = False
    check: bool = False
    view: bool = False
    along: str = ""
    normalized: str = ""
    transposes: bool = False
    evaluation: dict[str, Any] = field(default_factory=dict)
    statistics: tuple[str, tuple[str, ...]] = ("", ())
    product: Literal["", "linear", "matmul", "filter", "other"] = ""
    summed: str = ""
    fresh: bool = False


def _all(names: str, op: Op) -> dict[str, Op]:
    return dict.fromkeys(names.split(), op)


_UNKNOWN = Op()
OPS: dict[str, Op] = {
    # products
    "linear": Op(rows="kept", positions="features", product="linear", summed="input"),
    "addmm": Op(rows="kept", product="matmul", summed="mat1"),
    "mm": Op(rows="kept", product="matmul", summed="self"),
    "matmul": Op(positions="all", product="matmul", summed="self"),
    "bmm": Op(positions="all", product="other", summed="self"),
    "baddbmm": Op(product="other", summed="batch1"),
    "einsum": Op(product="other"),
    "scaled_dot_product_attention": Op(positions="all", evaluation={"dropout_p": 0.0}),
    **_all("conv1d conv3d", Op(product="filter")),
    **_all("conv2d convolution", Op(positions="convolution", product="filter", fresh=True)),
    # norms and pools
    "batch_norm": Op(
        positions="map",
        channels=True,
        evaluation={"training": False},
        statistics=("training", ("running_mean", "running_var")),
        fresh=True,
    ),
    **_all(
        "layer_norm rms_norm",
        Op(rows="kept", positions="features", channels=True, normalized="normalized_shape"),
    ),
    **_all("group_norm instance_norm", Op(positions="norm")),
    **_all("max_pool2d avg_pool2d", Op(positions="pool", channels=True)),
    **_all("adaptive_avg_pool2d adaptive_max_pool2d mean sum amax", Op(positions="all")),
    # pointwise, where PyTorch does not say so
    "dropout": Op(pointwise=True, rows="kept", channels=True, evaluation={"train": False}),
    "feature_dropout": Op(positions="pointwise", channels=True, evaluation={"train": False}),
    "alpha_dropout": Op(pointwise=True, evaluation={"train": False}),
    "rrelu": Op(pointwise=True, evaluation={"training": False}),
    "prelu": Op(positions="map", channels=True),
    **_all(
        "gelu hardswish hardsigmoid mish selu celu relu6 softsign log_sigmoid tanhshrink detach "
        "alias lift_fresh_copy",
        Op(pointwise=True),
    ),
    **_all("softmax log_softmax", Op(rows="kept", positions="softmax", channels=True)),
    # the same elements
    **_all("clone contiguous", Op(pointwise=True, cast=True, rows="kept", channels=True)),
    **_all("to _to_copy", Op(pointwise=True, cast=True, rows="kept")),
    **_all("view reshape flatten", Op(rows="merged", positions="all", view=True)),
    "_unsafe_view": Op(rows="kept", view=True),
    **_all("unsqueeze squeeze", Op(view=True)),
    **_all("permute transpose", Op(positions="permute", channels=True, transposes=True)),
    **_all("t numpy_T", Op(transposes=True)),
    # parts and wholes
    "slice": Op(positions="slice", channels=True, along="dim"),
    **_all("chunk split split_with_sizes", Op(positions="split", along="dim")),
    "glu": Op(along="dim"),
    "cat": Op(positions="cat"),
    **_all("pad constant_pad_nd", Op(positions="pad")),
    # sizes and checks
    **_all(
        "new_ones new_zeros new_full new_empty zeros_like ones_like full_like empty_like "
        "rand_like randn_like sym_size sym_numel",
        Op(sizes_only=True),
    ),
    **_all(
        "_assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size",
        Op(check=True),
    ),
}
OTHERWISE = {torch.ops.aten.view.dtype}  # overloads that do something else than their name says


def op_name(node: fx.Node) -> str:
    """The operator's name: ``aten.linear.default`` -> ``linear``, ``aten.add_.Tensor`` -> ``add``."""
    return _name(node.target)


@cache
def _name(target: Any) -> str:
    name = str(getattr(target, "overloadpacket", target)).rpartition(".")[2]
    return name if name.startswith("_") else name.removesuffix("_")


def op(node: fx.Node) -> Op:
    """What is known of a node's operator."""
    known = hasattr(node.target, "_schema") and node.target not in OTHERWISE
    return OPS.get(op_name(node), _UNKNOWN) if known else _UNKNOWN


def is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return op(node).pointwise or torch.Tag.pointwise in tags


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


# -- arguments -------------------------------------------------------------------------------------


@cache
def _formal(target: Any) -> dict[str, tuple[int, Any]]:
    """Place and default of each argument by its name; keywords have places that no call reaches."""
    formal = target._schema.arguments
    return {a.name: (10**6 if a.kwarg_only else i, a.default_value) for i, a in enumerate(formal)}


def takes(node: fx.Node, name: str) -> bool:
    """Whether the operator has an argument of this name."""
    return name in _formal(node.target)


def argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name in the schema; the default where it is left out."""
    place, default = _formal(node.target)[name]
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an operator's argument another value; those before it are written out."""
    place, _ = _formal(node.target)[name]
    if place >= len(_formal(node.target)) or name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
        return
    names = list(_formal(node.target))[: max(place + 1, len(node.args))]
    given = [argument(node, n) for n in names]
    given[place] = value
    node.args = tuple(given)


def first(node: fx.Node) -> Any:
    """The first argument, which most operators work on; None without any."""
    return next(iter(node.args), None)


def output_of(graph: fx.Graph) -> Any:
    """What a graph gives."""
    return first(graph.output_node())


# -- what is written, and whose memory a value is --------------------------------------------------


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to in place."""
    writes: Callable[..., list[fx.Node]] | None = getattr(node.target, "writes", None)
    if writes is not None:  # a call of this package's own
        return writes(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    flag, hidden = op(node).statistics
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if flag and argument(node, flag) is True:
        names += hidden
    written = (argument(node, name) for name in names)
    return [n for n in written if isinstance(n, fx.Node)]


def out_of_place(node: fx.Node) -> Any:
    """Of an operator that works in place, the one that gives the same in memory of its own; None of
    any other."""
    packet = getattr(node.target, "overloadpacket", None)
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    plain = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = packet is not None and plain is not None and overload in plain.overloads()
    return getattr(plain, overload) if found else None


def alias_root(node: fx.Node) -> fx.Node:
    """Follow views and in-place results back to the node whose storage this one shows."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        returns: Any = schema.returns if schema is not None else ()
        shown = first(node)
        if len(returns) != 1 or returns[0].alias_info is None or not isinstance(shown, fx.Node):
            return node
        node = shown
    return node
