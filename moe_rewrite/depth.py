"""Where a captured graph can be cut, and the blocks between those places.

The mainline is every float value that depends both on the user's input and on a parameter. A cut
point is a node on every path of the mainline from its source to the output: a dominator of the
output. On residual networks these are the joins. Blocks are the numbered modules (``layers.3``)
that cut points separate, else repeated stretches, else single stretches that hold weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import SplitError
from .program import Program, alias_root, module_paths, mutated, value

aten = torch.ops.aten
# these take only the size or the dtype of their argument
SHAPE_ONLY = {
    "new_ones", "new_zeros", "new_full", "new_empty", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like", "sym_size", "sym_numel",
}  # fmt: skip
TENSOR_CUT_RANKS = (2, 3, 4)


@dataclass(frozen=True)
class Block:
    """One stretch of the graph between two cut points.

    exit: name of its last mainline node, a cut point (of the output for the head).
    shape: of the exit, symbols for dynamic sizes. params: elements of the weights used first here.
    flops: multiply-adds times two, at the example's sizes. first: graph position of its first node.
    """

    name: str
    exit: str
    shape: tuple[str, ...]
    params: int
    flops: int
    first: int
    last: int


@dataclass(frozen=True)
class DepthMap:
    """The blocks of a model, in order. ``print(depth)`` is a table.

    stem and head are what lies before the first and after the last block. points: (graph position,
    node name) of every cut point. starts: graph position where each module's mainline begins.
    stack: the dotted name of the stack a model with several mainlines was analysed for.
    """

    model: str
    stem: Block | None
    blocks: tuple[Block, ...]
    head: Block | None
    points: tuple[tuple[int, str], ...]
    starts: dict[str, int]
    stack: str | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        from .report import depth_table

        return depth_table(self)

    @property
    def parts(self) -> tuple[Block, ...]:
        """Stem, blocks and head, those that exist."""
        return tuple(b for b in (self.stem, *self.blocks, self.head) if b is not None)

    def resolve(self, split: int | float | str) -> tuple[int, str]:
        """(index of the first deep block, its cut node) for a split as a user gives it.

        split: block index, negative index, fraction of FLOPs between 0 and 1, dotted name of the
        first deep module, or ``"auto"`` (half of the FLOPs). Raises SplitError, with this map.
        """
        n = len(self.blocks)
        if isinstance(split, str) and split != "auto":
            return self._resolve_name(split)
        if isinstance(split, bool) or not isinstance(split, (int, float, str)):
            raise self._error(split, "a block index, a fraction of FLOPs, a module name or 'auto'")
        if isinstance(split, int):
            index = split + n if split < 0 else split
            if not 0 <= index < n:
                raise self._error(split, f"an index from {-n} to {n - 1}")
        else:
            fraction = 0.5 if isinstance(split, str) else split
            if not 0 < fraction < 1:
                raise self._error(split, "a fraction between 0 and 1, both excluded")
            index = self._by_flops(fraction)
        return index, self._exit_before(index, split)

    def _by_flops(self, fraction: float) -> int:
        goal = fraction * sum(b.flops for b in self.blocks)
        done = 0
        for index, block in enumerate(self.blocks):
            if done >= goal and index > 0:
                return index
            done += block.flops
        return len(self.blocks) - 1

    def _exit_before(self, index: int, split: object) -> str:
        before = self.blocks[index - 1] if index else self.stem
        if before is None or before.exit not in {name for _, name in self.points}:
            raise self._error(split, "a later block: nothing with features lies before this one")
        return before.exit

    def _resolve_name(self, name: str) -> tuple[int, str]:
        start = self.starts.get(name)
        if start is None:
            raise self._error(name, "the dotted name of a module that the graph runs")
        before = [(at, node) for at, node in self.points if at < start]
        if not before:
            raise self._error(name, "a later module: no cut point lies before this one")
        at, node = before[-1]
        index = sum(b.last <= at for b in self.blocks)
        if index >= len(self.blocks):
            raise self._error(name, "a module inside the blocks: this one comes after them")
        return index, node

    def _error(self, split: object, expected: str) -> SplitError:
        return SplitError(f"split={split!r}: expected {expected}. The model's blocks:\n{self}")


def analyse(program: Program, model: str, split: object = None) -> DepthMap:
    """The depth map of a captured program.

    split: where the user wants to cut; a dotted name chooses the mainline in models that have
    several (an encoder and a decoder). Without one, the mainline with the most blocks is shown.
    """
    nodes = list(program.graph.nodes)
    mainline, edges = _mainline(program, nodes)
    sink = _primary_output(program, mainline, edges)
    if sink is None:
        raise SplitError(f"{model}: no output depends on both an input and a parameter")
    scopes = _stacks(nodes, mainline)
    if isinstance(split, str):
        named = [s for s in scopes if split.startswith(s + ".") or split == s]
        first = _map(program, nodes, mainline, edges, sink, model, None)
        if not named or _separates(first, split):
            return first
        return _map(program, nodes, mainline, edges, sink, model, named[0])
    maps = [_map(program, nodes, mainline, edges, sink, model, s) for s in (None, *scopes)]
    return max(maps, key=lambda m: len(m.blocks))


def _separates(depth: DepthMap, name: str) -> bool:
    """Whether a cut point lies between the named module and its preceding sibling."""
    start = depth.starts.get(name)
    if start is None:
        return False
    parent, _, last = name.rpartition(".")
    sibling = f"{parent}.{int(last) - 1}" if last.isdigit() and int(last) > 0 else None
    low = depth.starts.get(sibling, -1) if sibling else -1
    return any(low < at < start for at, _ in depth.points)


def _mainline(
    program: Program, nodes: Sequence[fx.Node]
) -> tuple[dict[fx.Node, int], dict[fx.Node, list[fx.Node]]]:
    """Mainline nodes with their position, and each one's mainline predecessors."""
    user: dict[fx.Node, bool] = {}
    parameter: dict[fx.Node, bool] = {}
    mainline: dict[fx.Node, int] = {}
    edges: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[fx.Node, fx.Node] = {}  # storage -> the mainline node that wrote to it last
    for at, node in enumerate(nodes):
        kind = program.inputs[node.name].kind if node.op == "placeholder" else ""
        sources = [n for n in node.all_input_nodes if _carries_value(n)]
        sources += [writers[r] for r in map(alias_root, sources) if r in writers]
        by_shape = _op_name(node) in SHAPE_ONLY
        user[node] = kind == "user" or (not by_shape and any(user[s] for s in sources))
        parameter[node] = kind == "weight" or (not by_shape and any(parameter[s] for s in sources))
        if node.op == "output" or kind or not (user[node] and parameter[node]):
            continue
        if _is_float(value(node)):
            mainline[node] = at
            edges[node] = list(dict.fromkeys(s for s in sources if s in mainline))
            for written in mutated(node):
                writers[alias_root(written)] = node
    return mainline, edges


def _op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def _carries_value(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value(node)))


def _is_float(val: object) -> bool:
    tensors = [v for v in pytree.tree_leaves(val) if isinstance(v, torch.Tensor)]
    return any(t.is_floating_point() for t in tensors)


def _primary_output(
    program: Program, mainline: dict[fx.Node, int], edges: dict[fx.Node, list[fx.Node]]
) -> fx.Node | None:
    """The output that the longest computation leads to (the logits, not a cached key)."""
    outputs = pytree.tree_leaves(program.graph.output_node().args)
    best, most = None, 0
    for node in outputs:
        if isinstance(node, fx.Node) and node in mainline:
            size = len(_ancestors(node, edges))
            if size > most:
                best, most = node, size
    return best


def _ancestors(node: fx.Node, edges: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for source in edges[stack.pop()]:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _chain(
    mainline: dict[fx.Node, int],
    edges: dict[fx.Node, list[fx.Node]],
    sink: fx.Node,
    scope: str | None,
) -> list[fx.Node]:
    """Cut points in order: dominators of the sink, from the source or from a scope's first node."""
    import networkx as nx

    live = _ancestors(sink, edges)
    if scope is not None:
        source = next((n for n in mainline if n in live and _inside(n, scope)), None)
        if source is None:
            return []
        reached = {source}
        for node in mainline:  # in graph order, so one sweep reaches everything
            if any(s in reached for s in edges[node]):
                reached.add(node)
        live &= reached
    graph = nx.DiGraph()
    root = "source"
    for node in live:
        sources = [s for s in edges[node] if s in live]
        graph.add_edges_from((s, node) for s in sources or [root])
    parents = nx.immediate_dominators(graph, root)
    chain, node = [], sink
    while node != root:
        chain.append(node)
        node = parents[node]
    return chain[::-1]


def _inside(node: fx.Node, path: str) -> bool:
    return any(p == path or p.startswith(path + ".") for p, _ in module_paths(node))


def _stacks(nodes: Sequence[fx.Node], mainline: dict[fx.Node, int]) -> list[str]:
    """Top-level parts that hold numbered modules: ``encoder`` and ``decoder`` of a T5."""
    tops: dict[str, None] = {}
    for node in mainline:
        for path, _ in module_paths(node):
            parent, _, last = path.rpartition(".")
            if last.isdigit() and parent:
                tops[parent.rpartition(".")[0] or parent] = None
                break
    return list(tops) if len(tops) > 1 else []


@dataclass
class _Module:
    path: str
    kind: str
    first: int
    last: int
    composite: bool = False
    weighted: bool = False


def _modules(mainline: dict[fx.Node, int], program: Program) -> dict[str, _Module]:
    """Every module on the mainline with the graph positions it spans."""
    found: dict[str, _Module] = {}
    for node, at in mainline.items():
        paths = module_paths(node)
        weighted = any(
            program.inputs[i.name].kind == "weight"
            for i in node.all_input_nodes if i.op == "placeholder"
        )  # fmt: skip
        for depth, (path, kind) in enumerate(paths):
            module = found.setdefault(path, _Module(path, kind, at, at))
            module.last = max(module.last, at)
            module.composite |= depth + 1 < len(paths)
            module.weighted |= weighted
    return found


def _map(
    program: Program,
    nodes: Sequence[fx.Node],
    mainline: dict[fx.Node, int],
    edges: dict[fx.Node, list[fx.Node]],
    sink: fx.Node,
    model: str,
    scope: str | None,
) -> DepthMap:
    chain = _chain(mainline, edges, sink, scope)
    tensors = [
        n for n in chain if isinstance(value(n), torch.Tensor) and value(n).is_floating_point()
    ]
    points = [(mainline[n], n.name) for n in tensors if value(n).ndim in TENSOR_CUT_RANKS]
    positions = [at for at, _ in points]
    modules = _modules(mainline, program)
    spans = _numbered_blocks(modules, positions, scope)
    if not spans:
        spans = _repeated_blocks(nodes, positions, program) or _single_blocks(
            nodes, positions, program
        )
    return _measure(program, nodes, spans, points, sink, mainline, modules, model, scope)


def _numbered_blocks(
    modules: dict[str, _Module], points: list[int], scope: str | None
) -> list[tuple[str, int, int]]:
    """(name, first, exit position) of the numbered modules that cut points separate."""
    numbered = [
        m for m in modules.values()
        if m.path.rpartition(".")[2].isdigit() and m.weighted
        and (scope is None or m.path.startswith(scope + "."))
    ]  # fmt: skip
    if any(m.composite for m in numbered):
        numbered = [m for m in numbered if m.composite]
    paths = {m.path for m in numbered}
    outermost = [m for m in numbered if not any(_under(m.path, p) for p in paths - {m.path})]
    chosen = [leaf for m in outermost for leaf in _descend(m, numbered, points)]
    chosen.sort(key=lambda m: m.first)
    return _separate(chosen, points)


def _under(path: str, parent: str) -> bool:
    return path.startswith(parent + ".")


def _descend(module: _Module, numbered: list[_Module], points: list[int]) -> list[_Module]:
    """A stage (``stages.1``) gives way to its layers where they are blocks of one kind."""
    inner = [m for m in numbered if _under(m.path, module.path)]
    inner = [m for m in inner if not any(_under(m.path, o.path) for o in inner)]
    alike = len({m.kind for m in inner}) == 1 and all(m.composite for m in inner)
    inner.sort(key=lambda m: m.first)
    if inner and alike and len(_separate(inner, points)) == len(inner):
        return [leaf for m in inner for leaf in _descend(m, numbered, points)]
    return [module]


def _separate(modules: list[_Module], points: list[int]) -> list[tuple[str, int, int]]:
    """Give each module the last cut point before the next one; merge those without one between."""
    spans: list[tuple[str, int, int]] = []
    start: _Module | None = None
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        start = start or module
        if following is None:
            after = [p for p in points if p >= module.last]
            exits = after[:1]
        else:
            exits = [p for p in points if module.last <= p < following.first]
        if exits:
            name = start.path if start is module else f"{start.path}..{module.path}"
            spans.append((name, start.first, exits[-1]))
            start = None
    return spans


def _stretch_hashes(
    nodes: Sequence[fx.Node], points: list[int]
) -> list[tuple[tuple[object, ...], int, int]]:
    """(what a stretch computes, first, last) between neighbouring cut points.

    Sizes are compared at the example's values: symbolic ones carry names that differ.
    """
    stretches = []
    for low, high in zip([-1, *points], points, strict=False):
        ops = []
        for node in nodes[low + 1 : high + 1]:
            if node.op == "call_function" and isinstance(value(node), torch.Tensor):
                ops.append((str(node.target), tuple(_hint(s) for s in value(node).shape)))
        stretches.append((tuple(ops), low + 1, high))
    return stretches


def _repeated_blocks(
    nodes: Sequence[fx.Node], points: list[int], program: Program
) -> list[tuple[str, int, int]]:
    """The longest run of equal stretches, for models whose blocks have no numbered names."""
    stretches = _stretch_hashes(nodes, points)
    hashes = [h for h, _, _ in stretches]
    best: tuple[int, int, int, int] = (0, 0, 0, 0)  # (covered, -period, start, repeats)
    for period in range(1, len(hashes) // 2 + 1):
        start = 0
        while start + 2 * period <= len(hashes):
            unit, repeats = hashes[start : start + period], 1
            while hashes[start + repeats * period : start + (repeats + 1) * period] == unit:
                repeats += 1
            if repeats > 1:
                best = max(best, (repeats * period, -period, start, repeats))
            start += max(1, (repeats - 1) * period) if repeats > 1 else 1
    covered, period, start, repeats = best[0], -best[1], best[2], best[3]
    if not covered:
        return []
    spans = []
    for i in range(repeats):
        unit_ = stretches[start + i * period : start + (i + 1) * period]
        spans.append((f"block{i}", unit_[0][1], unit_[-1][2]))
    held = [s for s in spans if any(True for _ in _weights(nodes[s[1] : s[2] + 1], program))]
    return held if len(held) == len(spans) else []


def _single_blocks(
    nodes: Sequence[fx.Node], points: list[int], program: Program
) -> list[tuple[str, int, int]]:
    """Every stretch that holds weights; one without joins the stretch before it."""
    spans: list[tuple[str, int, int]] = []
    for low, high in zip([-1, *points], points, strict=False):
        stretch = nodes[low + 1 : high + 1]
        if not any(True for _ in _weights(stretch, program)):
            if spans:
                spans[-1] = (*spans[-1][:2], high)
            continue
        paths = [
            p[-1][0] for n in stretch if n.op == "call_function" and (p := module_paths(n))
        ]  # fmt: skip
        name = paths[-1] if paths else f"block{len(spans)}"
        used = {s[0] for s in spans}
        spans.append((name if name not in used else f"{name}#{len(spans)}", low + 1, high))
    return spans


def _weights(nodes: Sequence[fx.Node], program: Program) -> list[fx.Node]:
    found = {}
    for node in nodes:
        if node.op == "placeholder":
            continue
        for source in node.all_input_nodes:
            if source.op == "placeholder" and program.inputs[source.name].kind == "weight":
                found[source] = None
    return list(found)


def _measure(
    program: Program,
    nodes: Sequence[fx.Node],
    spans: list[tuple[str, int, int]],
    points: list[tuple[int, str]],
    sink: fx.Node,
    mainline: dict[fx.Node, int],
    modules: dict[str, _Module],
    model: str,
    scope: str | None,
) -> DepthMap:
    """Blocks with sizes, parameters and FLOPs; a weight counts where it is used first."""
    counted: set[fx.Node] = set()

    def block(name: str, first: int, last: int, node: fx.Node) -> Block:
        stretch = nodes[first : last + 1]
        fresh = [w for w in _weights(stretch, program) if w not in counted]
        counted.update(fresh)
        params = sum(math.prod(_hint(s) for s in value(w).shape) for w in fresh)
        shape = tuple(str(s) for s in value(node).shape)
        return Block(name, node.name, shape, params, sum(map(flops, stretch)), first, last)

    at_end = len(nodes) - 1
    if not spans:
        whole = block(model, 0, at_end, sink)
        return DepthMap(model, whole, (), None, tuple(points), {}, scope)
    starts_at = [p for p, _ in points if p < spans[0][1]]
    stem_end = starts_at[-1] if starts_at else -1
    stem = block("stem", 0, stem_end, nodes[stem_end]) if stem_end >= 0 else None
    blocks, low = [], stem_end + 1
    for name, _, last in spans:
        blocks.append(block(name, low, last, nodes[last]))
        low = last + 1
    head = block("head", low, at_end, sink) if mainline[sink] >= low else None
    starts = {m.path: m.first for m in modules.values()}
    return DepthMap(model, stem, tuple(blocks), head, tuple(points), starts, scope)


def _hint(size: object) -> int:
    """A size at the example's values."""
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[attr-defined]


def _numel(val: torch.Tensor) -> int:
    return math.prod(_hint(s) for s in val.shape)


def flops(node: fx.Node) -> int:
    """Two per multiply-add of the products in a node; other operations count as nothing."""
    if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
        return 0
    name, out = _op_name(node), _numel(value(node))
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2 * out * _hint(value(node.args[0]).shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2 * out * _hint(value(node.args[1]).shape[-1])
    if name in ("conv1d", "conv2d", "conv3d", "convolution"):
        return 2 * out * math.prod(_hint(s) for s in value(node.args[1]).shape[1:])
    if name == "scaled_dot_product_attention":
        query, key = value(node.args[0]), value(node.args[1])
        return 2 * _hint(key.shape[-2]) * (_numel(query) + out)
    return 0
