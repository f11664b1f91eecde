"""Program -> Steps: one pure function per block, weights and carries as its arguments.

Exact: the nodes run in the captured order. A block is the unit of checkpointing, sharding and
regional compilation, so nothing here closes over a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..ir.program import Code, Program, alias_root, expression, mutated, routing_plan, value
from ..ir.structural_key import same_code
from ..routing.plan import Layout, align


@dataclass(frozen=True)
class Step:
    """One block's part of a graph.

    owned: (kind, name) of the weights, buffers and expert parts the code takes first, in order;
    takes, gives: names of the values it reads and makes; drops: values nobody reads afterwards;
    writes: positions in `owned` and, behind them, in `takes` that the code writes to in place.
    """

    block: str
    deep: bool
    code: Code
    owned: tuple[tuple[str, str], ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Emitted:
    """A program as the model runs it: steps up to the cut, the plan's layouts, steps after it.

    cut: name of the features that the router reads; mask: of the input that masks their rows.
    sizes: of each value that steps take or give, its tensors' sizes, or its own, as the capture has
    them: numbers, or expressions of what stays open.
    """

    steps: tuple[Step, ...]
    cut: str
    mask: str | None
    layouts: tuple[tuple[str, Layout], ...]
    outputs: tuple[Any, ...]  # value names, or constants of the graph
    constants: dict[str, torch.Tensor]
    sizes: dict[str, tuple[tuple[Any, ...], ...]]


def narrowed(step: Step, wanted: set[str]) -> Step:
    """The part of a step that gives only these of its values, and takes only what they need."""
    gives = tuple(name for name in step.gives if name in wanted)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    made: Any = graph.graph_copy(step.code.module.graph, copies)
    graph.output(tuple(made[i] for i, name in enumerate(step.gives) if name in wanted))
    _erase_unneeded(graph)
    placeholders = list(graph.find_nodes(op="placeholder"))
    takes = []
    for name, node in zip(step.takes, placeholders[len(step.owned) :], strict=True):
        if node.users:
            takes.append(name)
        else:
            graph.erase_node(node)
    writes = tuple(i for i in step.writes if i < len(step.owned))
    code = Code(fx.GraphModule(step.code.module, graph))  # which holds what the graph calls
    return replace(step, code=code, takes=tuple(takes), gives=gives, drops=(), writes=writes)


def _erase_unneeded(graph: fx.Graph) -> None:
    """Everything that the output does not depend on; fx keeps what may be random (attention)."""
    needed: set[fx.Node] = set()
    waiting = [graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in reversed(graph.nodes):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)


def emit(program: Program, codes: dict[tuple, Code] | None = None) -> Emitted:
    """codes: of what was emitted before; steps that are alike share theirs, and new ones are added."""
    assert program.cut is not None
    codes = {} if codes is None else codes
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    router = next(iter(program.graph.find_nodes(op="call_function", target=routing_plan)), None)
    planned = [n for n in program.graph.nodes if n.target is align]
    skip = {router, *planned}
    parts = [
        (name, deep, [n for n in nodes if n not in skip])
        for name, deep, nodes in _partition(program)
    ]
    owner = {n: i for i, (_, _, nodes) in enumerate(parts) for n in nodes}
    last_use: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            at = len(parts) if node.op == "output" else owner.get(node, _first_deep(parts))
            last_use[source] = max(last_use.get(source, 0), at)
    last_use[program.node(program.cut.node)] = max(
        last_use.get(program.node(program.cut.node), 0), _first_deep(parts)
    )
    steps = tuple(
        _step(program, i, name, deep, nodes, owner, last_use, order, codes)
        for i, (name, deep, nodes) in enumerate(parts)
    )
    outputs = tuple(
        o.name if isinstance(o, fx.Node) else _Constant(o)
        for o in pytree.tree_leaves(program.graph.output_node().args[0])
    )
    layouts = tuple((n.name, n.args[1]) for n in planned)
    between = {name for step in steps for name in (*step.takes, *step.gives)}
    known = (n for n in program.graph.nodes if n.name in between and value(n) is not None)
    sizes = {n.name: _sizes(value(n)) for n in known}
    return Emitted(
        steps, program.cut.node, program.cut.mask, layouts, outputs, program.constants, sizes
    )


def _sizes(made: Any) -> tuple[tuple[Any, ...], ...]:
    """Of each tensor or number in a value."""
    leaves = pytree.tree_leaves(made)
    each = [leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
    return tuple(tuple(map(expression, shape)) for shape in each)


@dataclass(frozen=True)
class _Constant:
    """An output that is no tensor of the graph (None, an int)."""

    value: Any


def _first_deep(parts: list[tuple[str, bool, list[fx.Node]]]) -> int:
    return next(i for i, (_, deep, _) in enumerate(parts) if deep)


def _partition(program: Program) -> list[tuple[str, bool, list[fx.Node]]]:
    """(block name, whether it is deep, its nodes), in order; a block with the cut inside is two."""
    depth, cut = program.depth, program.cut
    assert depth is not None and cut is not None
    exits = {b.exit: b.name for b in depth.parts[:-1]}
    parts: list[tuple[str, bool, list[fx.Node]]] = []
    nodes: list[fx.Node] = []
    deep = False
    names = [b.name for b in depth.parts]
    current = 0
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        nodes.append(node)
        if node.name in exits:
            parts.append((exits[node.name], deep, nodes))
            current, nodes = names.index(exits[node.name]) + 1, []
        elif node.name == cut.node:
            parts.append((names[current], deep, nodes))
            nodes = []
        deep |= node.name == cut.node
    if nodes:
        parts.append((names[min(current, len(names) - 1)], deep, nodes))
    return parts


def _step(
    program: Program,
    index: int,
    name: str,
    deep: bool,
    nodes: list[fx.Node],
    owner: dict[fx.Node, int],
    last_use: dict[fx.Node, int],
    order: dict[fx.Node, int],
    codes: dict[tuple, Code],
) -> Step:
    sources = {s for n in nodes for s in n.all_input_nodes if owner.get(s) != index}
    sources = {s for s in sources if s.op != "get_attr"}
    # gates last, so that the first deep block takes what those behind it take
    ordered = sorted(sources, key=lambda n: (n.target is align, order[n]))
    owned = [s for s in ordered if _is_owned(program, s)]
    takes = [s for s in ordered if s not in owned]
    gives = [n for n in nodes if last_use.get(n, -1) > index and n.op != "get_attr"]
    cut = program.node(program.cut.node) if program.cut else None
    if cut in nodes and cut not in gives:
        gives.append(cut)
    drops = [s for s in takes if last_use[s] <= index]

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in (*owned, *takes):
        copies[source] = graph.placeholder(source.name)
    for node in _attributes(nodes):
        copies[node] = graph.get_attr(str(node.target))
        _forget_values(program.root.get_submodule(str(node.target)))
    for node in nodes:
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    graph.output(tuple(copies[n] for n in gives))
    written = {alias_root(w) for n in nodes for w in mutated(n)}
    writes = tuple(i for i, s in enumerate((*owned, *takes)) if s in written)
    key = same_code(graph), program.root if _attributes(nodes) else None
    if key not in codes:
        codes[key] = Code(fx.GraphModule(program.root, graph))
    return Step(
        block=name,
        deep=deep,
        code=codes[key],
        owned=tuple((program.inputs[s.name].kind, program.inputs[s.name].name) for s in owned),
        takes=tuple(s.name for s in takes),
        gives=tuple(n.name for n in gives),
        drops=tuple(s.name for s in drops),
        writes=writes,
    )


def _attributes(nodes: list[fx.Node]) -> list[fx.Node]:
    """Sub-graphs of higher-order operators that these nodes call."""
    return list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s.op == "get_attr"))


def _forget_values(module: nn.Module) -> None:
    """What its graphs note beside their code, which holds all that the trace has seen."""
    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            node.meta = {}


def _is_owned(program: Program, node: fx.Node) -> bool:
    return node.op == "placeholder" and program.inputs[node.name].kind in (
        "weight", "buffer", "constant", "expert",
    )  # fmt: skip
