"""The table of operators: what each does, and access to its arguments by name.

No other file knows an argument's position. An operator goes by its name without namespace, overload
and trailing underscore, so that in-place variants share the entry.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

Positions = Literal[
    "", "pointwise", "convolution", "map", "pool", "pad", "slice", "permute", "features", "softmax",
    "split", "cat", "gate", "shuffle", "norm", "all",
]  # fmt: skip


@dataclass(frozen=True)
class Op:
    """What one operator does. A property that is left out is unknown, and assumed not to hold.

    pointwise: an element of the result depends only on the operands' elements at its position.
    rows: leading dimensions are ``"kept"``, or ``"merged"``: reshaped with their order kept.
    positions: what happens to a map's rows and columns; see `analysis.spatial`.
    channels: each output channel depends on the same input channel only.
    sizes_only: reads only the size and dtype of its argument.
    cast: the same values, perhaps in another dtype, device or memory format.
    check: computes nothing, only raises.
    view: the same elements under another shape.
    along: name of the argument with the dimension along which it slices or joins.
    normalized: name of the argument with the sizes over which it normalizes.
    transposes: permutes dimensions and does nothing else.
    evaluation: values of arguments in eval mode, where the statistics are given.
    statistics: name of a flag, and the arguments that are written while it is true although the
        schema does not say so.
    product: ``"linear"``: times a weight (out, in); ``"matmul"``: times one (in, out);
        ``"filter"``: a convolution; or ``"other"``.
    summed: name of the operand whose last dimension is summed over.
    fresh: the result never shares memory with an argument.
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
    **_all(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
        Op(positions="convolution", product="filter", fresh=True),
    ),
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
    "group_norm": Op(positions="norm"),
    "instance_norm": Op(
        positions="norm",
        channels=True,
        evaluation={"use_input_stats": False},
        statistics=("use_input_stats", ("running_mean", "running_var")),
    ),
    **_all("max_pool2d avg_pool2d", Op(positions="pool", channels=True)),
    **_all("adaptive_avg_pool2d adaptive_max_pool2d mean sum amax", Op(positions="all")),
    # pointwise, where PyTorch does not say so
    "dropout": Op(pointwise=True, rows="kept", channels=True, evaluation={"train": False}),
    "feature_dropout": Op(positions="pointwise", channels=True, evaluation={"train": False}),
    "alpha_dropout": Op(pointwise=True, evaluation={"train": False}),
    "rrelu": Op(pointwise=True, evaluation={"training": False}),
    **_all("lstm gru rnn_tanh rnn_relu", Op(evaluation={"train": False})),
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
    **_all("unsqueeze squeeze unflatten", Op(view=True)),
    **_all(
        "permute transpose movedim moveaxis swapaxes swapdims",
        Op(positions="permute", channels=True, transposes=True),
    ),
    **_all("t numpy_T mT adjoint", Op(transposes=True)),
    # parts and wholes
    "slice": Op(positions="slice", channels=True, along="dim"),
    **_all("chunk split split_with_sizes", Op(positions="split", along="dim")),
    "glu": Op(positions="gate", along="dim"),
    "channel_shuffle": Op(positions="shuffle"),
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
OTHERWISE = {torch.ops.aten.view.dtype}  # overloads that the entry of their name does not describe


def op_name(node: fx.Node) -> str:
    """The operator's name: ``aten.linear.default`` -> ``linear``, ``add_.Tensor`` -> ``add``."""
    return _name(node.target)


@cache
def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", getattr(target, "__name__", target))
    name = str(packet).rpartition(".")[2]
    return name if name.startswith("_") else name.removesuffix("_")


def op(node: fx.Node) -> Op:
    """The table's entry for a node's operator."""
    return _entry(node.target)


@cache
def _entry(target: Any) -> Op:
    known = hasattr(target, "_schema") and target not in OTHERWISE
    return OPS.get(_name(target), _UNKNOWN) if known else _UNKNOWN


def evaluation(node: fx.Node) -> dict[str, Any]:
    """The values of a node's arguments in eval mode. A norm without running statistics computes the
    same in both modes."""
    _, statistics = op(node).statistics
    absent = statistics and any(argument(node, name) is None for name in statistics)
    return {} if absent else op(node).evaluation


def is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return op(node).pointwise or torch.Tag.pointwise in tags


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


# -- arguments -------------------------------------------------------------------------------------


@cache
def _formal(target: Any) -> dict[str, tuple[int, Any]]:
    """(position, default) of each argument by name; the position of keyword-only ones is huge."""
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
    """Set an operator's argument by its name; positional ones before it are filled in."""
    place, _ = _formal(node.target)[name]
    if place >= len(_formal(node.target)) or name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
        return
    names = list(_formal(node.target))[: max(place + 1, len(node.args))]
    given = [argument(node, n) for n in names]
    given[place] = value
    node.args = tuple(given)
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in names}


def first(node: fx.Node) -> Any:
    """The first argument, which is the main operand of most operators; None without any."""
    return next(iter(node.args), None)


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments; one that is given twice is listed twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def output_of(graph: fx.Graph) -> Any:
    """What a graph returns."""
    return first(graph.output_node())


# -- what is written, and whose memory a value is --------------------------------------------------


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to in place."""
    writes: Callable[..., list[fx.Node]] | None = getattr(node.target, "writes", None)
    if writes is not None:  # a callable of this package
        return writes(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return _written_inside(node)
    flag, hidden = op(node).statistics
    names = _written_names(node.target)
    if flag and argument(node, flag) is True:
        names += hidden
    written = (argument(node, name) for name in names)
    return [n for n in written if isinstance(n, fx.Node)]


@cache
def _written_names(target: Any) -> tuple[str, ...]:
    """The arguments that an operator's schema says are written to."""
    formal = target._schema.arguments
    return tuple(a.name for a in formal if a.alias_info is not None and a.alias_info.is_write)


def _written_inside(node: fx.Node) -> list[fx.Node]:
    """The arguments that the sub-graph of a higher-order operator (no_grad, autocast) writes to."""
    inner, given = subgraph(node)
    if inner is None:
        return []
    inputs = inner.find_nodes(op="placeholder")
    written = {alias_root(w) for n in inner.nodes for w in mutated(n)}
    return [
        g for i, g in zip(inputs, given, strict=True) if i in written and isinstance(g, fx.Node)
    ]


def subgraph(node: fx.Node) -> tuple[fx.Graph | None, tuple[Any, ...]]:
    """The graph that a higher-order operator runs, and what it is given; None for other nodes."""
    given: list[Any] = list(node.args) if node.op == "call_function" else []
    at = [i for i, a in enumerate(given) if isinstance(a, fx.Node) and a.op == "get_attr"]
    root = node.graph.owning_module
    if len(at) != 1 or root is None:
        return None, ()
    inner = getattr(root, str(given[at[0]].target), None)
    return getattr(inner, "graph", None), tuple(given[at[0] + 1 :])


def must_stay(node: fx.Node) -> bool:
    """Whether a node does something even if nothing reads it: fx does not look into regions."""
    return node.op == "placeholder" or node.is_impure() or bool(mutated(node))


def out_of_place(node: fx.Node) -> Any:
    """The out-of-place variant of an in-place operator; None for other operators."""
    packet = getattr(node.target, "overloadpacket", None)
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    plain = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = packet is not None and plain is not None and overload in plain.overloads()
    return getattr(plain, overload) if found else None


def alias_chain(node: fx.Node) -> list[fx.Node]:
    """From this node back over views and in-place results to the one whose storage they share."""
    chain = [node]
    while (shown := _aliased(chain[-1])) is not None:
        chain.append(shown)
    return chain


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose storage this one shows."""
    return alias_chain(node)[-1]


def _aliased(node: fx.Node) -> fx.Node | None:
    """What a node's result is a view of, or written into."""
    if node.op != "call_function" or not isinstance(shown := first(node), fx.Node):
        return None
    if node.target is operator.getitem:  # one of the parts of what is split
        return _aliased(shown)
    schema = getattr(node.target, "_schema", None)
    returns: Any = schema.returns if schema is not None else ()
    return shown if len(returns) == 1 and returns[0].alias_info is not None else None
