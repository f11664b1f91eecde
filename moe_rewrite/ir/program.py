"""The unit that every pass takes and returns: one captured graph and what is known about it.

The graph is lifted: parameters, buffers and constants are placeholders beside the user's inputs,
so a graph owns nothing and several graphs (eval, train, decode) can serve the same weights.
A pass owns the graph it is given: it may edit it in place and hands back a new Program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

from ..errors import InvariantError
from .depth_map import DepthMap

CACHE = "past_key_values"  # the argument and output that hold a key-value cache
Numerics = Literal["exact", "reordered", "approximate"]


@dataclass(frozen=True)
class Input:
    """What a placeholder stands for.

    kind: ``"weight"`` (a parameter), ``"buffer"``, ``"constant"``, ``"user"`` (a leaf of the call's
        arguments), ``"state"`` (the router's running state) or ``"expert"``.
    name: the state-dict name, the argument's path, or the site and part of an expert.
    """

    kind: str
    name: str


class Code:
    """A compiled piece of a graph: immutable, so a deep copy of the model shares it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.call: Callable[..., Any] = module.forward

    def __deepcopy__(self, memo: dict) -> Code:
        return self


@dataclass(frozen=True)
class Site:
    """A place where LoRA experts work: one frozen weight and every node that applies it.

    name: dotted name of the module that owns the weight, or of a bare parameter.
    weight: state-dict name. transposed: the weight is stored as (in, out). kernel: (h, w) of a
    convolution, empty for a linear map.
    """

    name: str
    weight: str
    in_features: int
    out_features: int
    transposed: bool
    kernel: tuple[int, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True)
class Part:
    """A weight or buffer of a region, as each expert has it.

    name: state-dict name of the dense one. kept: (dimension, elements that an expert has of it) of
    the dimensions of which it has a share.
    """

    name: str
    kind: str
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RegionSite:
    """A region that experts run: its weights, and the shapes (C, H, W) of its entry and exit.

    dense_macs: multiply-adds of the dense region on one sample; expert_macs: of one expert on one
    patch; score_macs: of one expert's scores of a sample.
    """

    name: str
    parts: tuple[Part, ...]
    in_features: str
    out_features: str
    dense_macs: int
    expert_macs: int
    score_macs: int
    ends: str

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts)


@dataclass(frozen=True)
class FeedForwardSite:
    """A feed-forward region in whose place experts run: its weights, the width of its rows and of
    what lies inside, and whether one product gates another."""

    name: str
    parts: tuple[Part, ...]
    features: int
    hidden: int
    gated: bool

    @property
    def in_features(self) -> int:
        return self.features

    out_features = in_features

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parts)


@dataclass(frozen=True)
class HeadSite:
    """A classification head that experts can widen. weight: state-dict name."""

    name: str
    weight: str
    in_features: int

    @property
    def weights(self) -> tuple[str, ...]:
        return (self.weight,)


AnySite = Site | RegionSite | FeedForwardSite | HeadSite


@dataclass(frozen=True)
class Rejection:
    """A site that could have held experts, and why it does not."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cut:
    """Where shallow ends. node: the last shallow node, whose value the router reads.

    label: the module that starts the deep segment; index: the first deep block.
    rows: the user's input whose positions are the rows at the cut, mask: the one that says which
    of them count; None where there is none.
    """

    node: str
    label: str
    index: int
    rows: str | None
    mask: str | None


@dataclass(frozen=True)
class Program:
    """A captured graph on its way to a converted one. See the module docstring.

    graph: lifted FX graph; node.meta["val"] holds fake values with symbolic sizes.
    root: owns the sub-graphs of higher-order operators, nothing else.
    inputs: what each placeholder stands for, by node name.
    constants: values of the "constant" inputs. out_spec: pytree of the output.
    lowered: (name of a site, how it is computed).
    mode: "eval" or "train". held: freezing turned something off before the cut that also runs
    behind it (a shared layer), so that no setting of the modules' modes computes the same.
    """

    graph: fx.Graph
    root: torch.nn.Module
    inputs: dict[str, Input]
    constants: dict[str, torch.Tensor]
    in_spec: Any
    out_spec: Any
    mode: str
    depth: DepthMap | None = None
    cut: Cut | None = None
    sites: tuple[AnySite, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    lowered: tuple[tuple[str, str], ...] = ()
    held: bool = False
    numerics: tuple[tuple[str, Numerics], ...] = field(default=())

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)

    def leaves(self) -> list[fx.Node]:
        """Placeholders of the user's inputs, in the order of the flattened call."""
        placeholders = self.graph.find_nodes(op="placeholder")
        return [n for n in placeholders if self.inputs[n.name].kind == "user"]

    def names(self, *kinds: str) -> set[str]:
        return {i.name for i in self.inputs.values() if i.kind in kinds}

    def after(self, pass_name: str, numerics: Numerics, **changes: Any) -> Program:
        """The program that a pass hands back, with the pass's declared numerics on record."""
        done = replace(self, numerics=(*self.numerics, (pass_name, numerics)), **changes)
        check(done)
        return done


def routing_plan(features: torch.Tensor) -> Any:
    """The router's node in a graph. Emitting takes it out: the model's own Router runs there."""
    raise InvariantError("a routing plan was asked for outside a converted model")


def check(program: Program) -> None:
    """Raise InvariantError unless the program is one that a pass may hand on."""
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise InvariantError(f"the graph is not well formed: {error}") from error
    placeholders = {n.name for n in program.graph.find_nodes(op="placeholder")}
    if placeholders != set(program.inputs):
        odd = sorted(placeholders ^ set(program.inputs))
        raise InvariantError(f"placeholders without a meaning, or the reverse: {odd}")
    owned = [i.name for i in program.inputs.values() if i.kind in ("weight", "buffer", "expert")]
    if len(owned) != len(set(owned)):
        twice = sorted({n for n in owned if owned.count(n) > 1})
        raise InvariantError(f"owned twice: {twice}")
    if program.cut is not None:
        _check_router(program)


def _check_router(program: Program) -> None:
    """The one router reads the cut, and every expert input meets only nodes that it feeds."""
    routers = program.graph.find_nodes(op="call_function", target=routing_plan)
    if len(routers) > 1:
        raise InvariantError(f"{len(routers)} routers: expected one")
    if not routers:
        return
    assert program.cut is not None
    if routers[0].args[0].name != program.cut.node:
        raise InvariantError(f"the router reads {routers[0].args[0]}, not the cut")
    fed = reach(routers[0], lambda n: n.users)
    for node in program.graph.find_nodes(op="placeholder"):
        if program.inputs[node.name].kind == "expert" and not set(node.users) <= fed:
            raise InvariantError(
                f"expert {program.inputs[node.name].name} is not fed by the router"
            )


def reach(node: fx.Node, steps: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """This node and every one that repeated steps lead to: its users, or its inputs."""
    seen, stack = {node}, [node]
    while stack:
        fresh = [n for n in steps(stack.pop()) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def module_paths(node: fx.Node) -> list[tuple[str, str]]:
    """(dotted path, class name) of the modules around a node, outermost first, the root left out.

    torch.export writes the second call of a shared module as ``path@1``: that is the same module.
    """
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(str(path).split("@")[0], str(kind)) for path, kind in stack.values()]
    return [(p, k) for p, k in entries if p and not p.startswith("_empty_nn_module_stack")]


def identifier(name: str) -> str:
    """A dotted name as part of a node's name."""
    return "".join(c if c.isalnum() else "_" for c in name)


def value(node: Any) -> Any:
    """The fake value of a node, which another takes as an argument (None: capture recorded none)."""
    return node.meta.get("val")


def argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name in the schema; the default where it is left out."""
    place, default = _arguments(node.target)[name]
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


@cache
def _arguments(target: Any) -> dict[str, tuple[int, Any]]:
    formal = target._schema.arguments
    return {a.name: (i, a.default_value) for i, a in enumerate(formal)}


def expression(size: Any) -> Any:
    """What an open size, or what is computed of such, is of the sizes of the call; all else as it
    is."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return size.node.expr if symbolic else size


def op_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload: ``aten.linear.default`` -> ``linear``."""
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to in place."""
    writes = getattr(node.target, "writes", None)  # a call of this package's own
    if writes is not None:
        return writes(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        # batch_norm in training writes its statistics, though its schema does not say so
        if node.target is torch.ops.aten.batch_norm.default and node.args[5:6] == (True,):
            return [a for a in node.args[3:5] if isinstance(a, fx.Node)]
        return []
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, fx.Node):
            written.append(given)
    return written


def alias_root(node: fx.Node) -> fx.Node:
    """Follow views and in-place results back to the node whose storage this one shows."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        returns: Any = schema.returns if schema is not None else ()
        if len(returns) != 1 or returns[0].alias_info is None or not node.args:
            return node
        if not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]
    return node
