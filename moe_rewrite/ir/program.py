"""Program, which every pass takes and returns: one captured graph and what is known about it.

The graph is lifted: parameters, buffers and constants are placeholders like the user's inputs, so a
graph owns nothing and several graphs (eval, train, decode) can share the same weights. A pass owns
the graph that it is given: it may edit it in place, and returns a new Program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from ..errors import InvariantError
from .aten import reach, value
from .call_values import CallValue
from .depth_map import DepthMap
from .ops import op_name, output_of
from .sites import AnySite, Found, HeadSite

Numerics = Literal["exact", "reordered", "approximate"]


@dataclass(frozen=True)
class Input:
    """What a placeholder stands for.

    kind: ``"weight"`` (a parameter), ``"buffer"``, ``"constant"``, ``"user"`` (a leaf of the call's
        arguments), ``"cache"`` (one of its key-value cache), ``"int"`` (an argument that is an
        int and changes from call to call) or ``"expert"``.
    name: the state-dict name, the argument's path, or the site and part of an expert.
    scheme: how a quantised weight is stored; the graph shows the matrix that it stands for.
    """

    kind: str
    name: str
    scheme: str = ""


class Code:
    """A compiled piece of a graph: immutable, so a deep copy of the model shares it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.call: Callable[..., Any] = module.forward
        self.eager: Callable[..., Any] | None = None  # a faster form, made on first use
        self.rows: Any = None  # one for inference, see `converted.inference_code`
        self.traced: dict[tuple, Callable[..., Any]] = {}  # forms for torch.compile, a case each

    def __deepcopy__(self, memo: dict) -> Code:
        return self


@dataclass(frozen=True)
class Table:
    """A value (..., S, S) over pairs of rows. attends: a row attends where it is true, or as a bias
    is not far below zero; else where it is false."""

    node: str
    attends: bool


@dataclass(frozen=True)
class Cut:
    """Where shallow ends. node: the last shallow node, whose value the router reads.

    label: name of the module that starts the deep segment.
    index: of the first deep block.
    rows: the user's input whose positions are the rows at the cut, or None.
    mask: the user's input that masks these rows, or None.
    token_map: (H, W) of the map of patches that became the rows (a ViT's tokens), or None.
    tables: those that say which rows attend to which; see `analysis.attention_tables`.
    unseen: more of these, which cannot be computed before the cut.
    line: the rows are the positions of a map over a line, whose features were moved to the end.
    """

    node: str
    label: str
    index: int
    rows: str | None
    mask: str | None
    token_map: tuple[int, int] | None = None
    tables: tuple[Table, ...] = ()
    unseen: tuple[str, ...] = ()
    line: bool = False


@dataclass(frozen=True)
class Program:
    """A captured graph on its way to a converted one. See the module docstring.

    ``print(program)`` lists the graph, one node a line.

    graph: lifted FX graph; node.meta["val"] holds fake values with symbolic sizes.
    root: owns the sub-graphs of higher-order operators, nothing else.
    inputs: what each placeholder stands for, by node name.
    constants: values of the "constant" inputs.
    in_spec, out_spec: pytree specs of the call and of the output.
    mode: "eval" or "train".
    relations: what capture states about the sizes of the inputs, and about values that were branched
        on, see `ir.conditions`.
    values: what computes these.
    model: name of the class that was captured.
    copied: how many calls of blocks were not traced but copied from others, see `frontend.replay`.
    depth: its blocks, once FindDepth ran.
    cut: where the shallow segment ends, once Split ran.
    found: sites that could hold experts, until experts are inserted.
    sites: those that do.
    head: the classification head that experts can widen.
    lowered: (name of a site, how it is computed).
    shallow_reruns: freezing switched off something before the cut that also runs after it (a
        shared layer), so that the dense model has no mode in which it computes the same.
    numerics: (pass, declared numerics) of every pass so far.
    """

    graph: fx.Graph
    root: torch.nn.Module
    inputs: dict[str, Input]
    constants: dict[str, torch.Tensor]
    in_spec: Any
    out_spec: Any
    mode: str
    relations: tuple[Any, ...] = ()
    values: tuple[CallValue, ...] = ()
    model: str = ""
    copied: int = 0
    depth: DepthMap | None = None
    cut: Cut | None = None
    found: Found | None = None
    sites: tuple[AnySite, ...] = ()
    head: HeadSite | None = None
    lowered: tuple[tuple[str, str], ...] = ()
    shallow_reruns: bool = False
    numerics: tuple[tuple[str, Numerics], ...] = field(default=())

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)

    def leaves(self, *kinds: str) -> list[fx.Node]:
        """Placeholders of the user's inputs, in the order of the flattened call: tensors, unless
        other kinds are asked for."""
        placeholders = self.graph.find_nodes(op="placeholder")
        kinds = kinds or ("user", "cache")
        return [n for n in placeholders if self.inputs[n.name].kind in kinds]

    def copy(self) -> Program:
        """The same program over a graph of its own, for a pass to edit; nodes keep their names."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].name = node.name  # which a copy changes where Python knows the name, too
        return replace(self, graph=graph)

    def __str__(self) -> str:
        lines = [f"{self.model or 'a program'} ({self.mode}):"]
        for node in self.graph.nodes:
            lines.append(_line(node, self.inputs))
            if self.cut is not None and node.name == self.cut.node:
                lines.append(f"-- deep from {self.cut.label} --")
        return "\n    ".join(lines)

    def quantized(self, node: fx.Node) -> bool:
        """Whether it is the placeholder of a quantised weight."""
        return node.op == "placeholder" and bool(self.inputs[node.name].scheme)

    def names(self, *kinds: str) -> set[str]:
        return {i.name for i in self.inputs.values() if i.kind in kinds}

    def after(self, pass_name: str, numerics: Numerics, **changes: Any) -> Program:
        """The program that a pass returns, with the pass's declared numerics recorded."""
        done = replace(self, numerics=(*self.numerics, (pass_name, numerics)), **changes)
        check(done)
        return done


def _line(node: fx.Node, inputs: dict[str, Input]) -> str:
    if node.op == "output":
        return f"return {_shown(output_of(node.graph))}"
    if node.op == "placeholder":
        given = inputs[node.name]
        line = f"{node.name}: {given.kind} {given.name}"
    else:
        named = [f"{k}={_shown(v)}" for k, v in node.kwargs.items()]
        called = op_name(node) if hasattr(node.target, "_schema") else _called(node.target)
        line = f"{node.name} = {called}({', '.join([*map(_shown, node.args), *named])})"
    made = value(node)
    if not isinstance(made, torch.Tensor):
        return line
    return f"{line}  # {str(made.dtype).removeprefix('torch.')}{list(made.shape)}"


def _called(target: Any) -> str:
    """The name of a function, or the class of a callable object."""
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _shown(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        inside = ", ".join(map(_shown, argument))
        return f"[{inside}]" if isinstance(argument, list) else f"({inside})"
    return argument.name if isinstance(argument, fx.Node) else repr(argument)


def routing_plan(features: torch.Tensor) -> Any:
    """Target of the router's node. Emitting removes the node: the model's Router runs there."""
    raise InvariantError("a routing plan was asked for outside a converted model")


def check(program: Program) -> None:
    """Raise InvariantError unless the program is valid: a pass may return no other."""
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
    """There is one router, it reads the cut, and experts are used only by nodes that it feeds."""
    routers = program.graph.find_nodes(op="call_function", target=routing_plan)
    if len(routers) > 1:
        raise InvariantError(f"{len(routers)} routers: expected one")
    if not routers:
        return
    assert program.cut is not None
    (read,) = routers[0].args
    if read is not program.node(program.cut.node):
        raise InvariantError(f"the router reads {read}, not the cut")
    fed = reach(routers[0], lambda n: n.users)
    for node in program.graph.find_nodes(op="placeholder"):
        if program.inputs[node.name].kind == "expert" and not set(node.users) <= fed:
            raise InvariantError(
                f"expert {program.inputs[node.name].name} is not fed by the router"
            )


def lead_of(features: Sequence[Any]) -> tuple[Any, ...]:
    """The row dimensions of a value at the cut: (batch, length), or (batch,) of a feature map."""
    return tuple(features[:-1]) if len(features) < 4 else tuple(features[:1])
