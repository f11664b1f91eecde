"""Program -> Steps: one pure function per block, with weights and values as arguments.

Exact: the nodes run in the captured order. A block is the unit of checkpointing, sharding and
regional compilation, so nothing here closes over a parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..ir.any_layout import allow_any_layout
from ..ir.aten import expression, value
from ..ir.ops import alias_root, mutated, output_of
from ..ir.program import Code, Program, routing_plan
from ..ir.steps import Emitted, Step, _Constant
from ..ir.structural_key import structural_key
from ..routing.layer_plan import layer_logits
from ..routing.plan_views import view_plan
from .grouped_heads import share_heads
from .quantized_products import call_functions
from .shared_masks import share_masks


def emit(program: Program, codes: dict[tuple, Code] | None = None) -> Emitted:
    """codes: structural key -> code of a step; steps of the same structure share it."""
    assert program.cut is not None
    codes = {} if codes is None else codes
    allow_any_layout(program.graph)
    call_functions(program)
    if program.mode == "eval":
        share_heads(program)
    share_masks(program)
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    router = next(iter(program.graph.find_nodes(op="call_function", target=routing_plan)), None)
    planned = [n for n in program.graph.nodes if n.target is view_plan]
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
    for name in (program.cut.node, *(t.node for t in program.cut.tables)):  # the router reads them
        node = program.node(name)
        last_use[node] = max(last_use.get(node, 0), _first_deep(parts))
    layers = tuple(program.graph.find_nodes(op="call_function", target=layer_logits))
    last_use |= dict.fromkeys(layers, len(parts))  # the plan keeps them
    steps = tuple(
        _step(program, i, name, deep, nodes, owner, last_use, order, codes)
        for i, (name, deep, nodes) in enumerate(parts)
    )
    outputs = tuple(
        o.name if isinstance(o, fx.Node) else _Constant(o)
        for o in pytree.tree_leaves(output_of(program.graph))
    )
    views = tuple((n.name, view) for n in planned for _, view in [n.args])
    between = {name for step in steps for name in (*step.takes, *step.gives)}
    known = (n for n in program.graph.nodes if n.name in between and value(n) is not None)
    sizes = {n.name: _sizes(value(n)) for n in known}
    return Emitted(
        steps, program.cut.node, program.cut.mask, program.cut.tables, views, outputs, program.constants, sizes,
        program.numerics, _computed(program.graph),
        tuple((_layer_of(n), n.name) for n in layers),
    )  # fmt: skip


def _layer_of(logits: fx.Node) -> str:
    (view, *_) = logits.args
    _, read = view.args  # type: ignore[union-attr]
    return read.layer  # type: ignore[union-attr]


def _computed(graph: fx.Graph) -> frozenset[torch.dtype]:
    """Dtypes of the floats that a graph computes with, casts of its outputs left out."""
    inner = [n for n in graph.nodes if any(user.op != "output" for user in n.users)]
    made = (leaf for n in inner for leaf in pytree.tree_leaves(value(n)))
    dtypes = {leaf.dtype.to_real() for leaf in made if isinstance(leaf, torch.Tensor)}
    return frozenset(d for d in dtypes if d.is_floating_point)


def _sizes(made: Any) -> tuple[tuple[Any, ...], ...]:
    """The sizes of each tensor in a value; a number counts as its own size."""
    leaves = pytree.tree_leaves(made)
    each = [leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
    return tuple(tuple(map(expression, shape)) for shape in each)


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
    # gates last, so that the first deep block has the same signature as later ones
    ordered = sorted(sources, key=lambda n: (n.target is view_plan, order[n]))
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
        _forget_example(getattr(program.root, str(node.target)))
    for node in nodes:
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    graph.output(tuple(copies[n] for n in gives))
    written = {alias_root(w) for n in nodes for w in mutated(n)}
    writes = tuple(i for i, s in enumerate((*owned, *takes)) if s in written)
    key = structural_key(graph), program.root if _attributes(nodes) else None
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


def _forget_example(attribute: Any) -> None:
    """Drop the metadata of a sub-graph's nodes, which keeps everything that the trace saw, and the
    memory layout of the example."""
    modules = attribute.modules() if isinstance(attribute, nn.Module) else ()
    for graph_module in (m for m in modules if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            node.meta = {}
        allow_any_layout(graph_module.graph)
        graph_module.recompile()


def _is_owned(program: Program, node: fx.Node) -> bool:
    return node.op == "placeholder" and program.inputs[node.name].kind in (
        "weight", "buffer", "constant", "expert",
    )  # fmt: skip
