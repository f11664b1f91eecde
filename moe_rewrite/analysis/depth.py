"""The blocks of a graph: the stretches between cut points that a user would call layers.

They are the numbered modules (``layers.3``) that cut points separate; without such modules,
repeated stretches; without repetition, every stretch that holds weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..ir.aten import module_paths, value
from ..ir.depth_map import Block, DepthMap
from ..ir.ops import op
from ..ir.program import Program
from .flops import Sizes, hint, numel
from .mainline import Mainline, find_mainline
from .side_values import without_jumps, without_side_values


@dataclass(frozen=True)
class _Span:
    """A named stretch of the graph, from its first node to its exit, by position."""

    name: str
    first: int
    last: int


@dataclass
class _Module:
    """One call of a module on the mainline, with the graph positions that it spans."""

    path: str
    kind: str
    first: int
    last: int
    composite: bool = False  # holds other modules
    weighted: bool = False  # holds a weight of two dimensions or more, so it is not just a norm
    call: int = 0

    @property
    def name(self) -> str:
        return f"{self.path}@{self.call}" if self.call else self.path

    @property
    def plain(self) -> bool:
        return not self.composite and self.kind.startswith("torch.nn.")

    def inside(self, path: str) -> bool:
        return self.path.startswith(path + ".")


def depth_map(program: Program, split: object = None) -> DepthMap:
    """The depth map of a captured program.

    split: where the user wants to cut; a dotted name chooses the mainline in models that have
    several. Without one, the whole model is shown where it has at least two blocks, else the stack
    that the others feed (a decoder), else the one with the most blocks.
    """
    line = find_mainline(program)
    whole = _map(program, line, None)
    stacks = line.stacks()
    if len(whole) > 1 and not stacks:
        return replace(whole, only=True)
    if len(whole) < 2 and not stacks and not _starts(whole, split):
        others = [_map(program, one, None) for one in without_side_values(line)]
        others += [_map(program, line, top) for top in line.tops()]
        found = max([whole, *others], key=len)
        return (
            found
            if len(found) > 1
            else max(found, _map(program, without_jumps(line), None), key=len)
        )
    if isinstance(split, str) and split != "auto":
        named = [s for s in stacks if split == s or split.startswith(s + ".")]
        if not named or _separates(whole, split):
            return whole
        return _map(program, line, named[0])
    if len(whole) > 1 or not stacks:
        return whole
    last = line.last_stack()
    if last is not None and len(fed := _map(program, line, last)) > 1:
        return fed
    maps = [whole, *(replace(_map(program, line, s), must_name=True) for s in stacks)]
    return max(maps, key=len)


def _starts(depth: DepthMap, split: object) -> bool:
    """Whether a module of this name begins after a cut point."""
    start = depth.starts.get(split) if isinstance(split, str) else None
    return start is not None and any(at < start for at, _ in depth.points)


def _separates(depth: DepthMap, name: str) -> bool:
    """Whether a cut point lies between the named module and its preceding sibling."""
    start = depth.starts.get(name)
    if start is None:
        return False
    parent, _, last = name.rpartition(".")
    sibling = f"{parent}.{int(last) - 1}" if last.isdigit() and int(last) > 0 else ""
    low = depth.starts.get(sibling, -1)
    return any(low < at < start for at, _ in depth.points)


def _map(program: Program, line: Mainline, stack: str | None) -> DepthMap:
    nodes = list(program.graph.nodes)
    points = line.cut_points(stack)
    places = [at for at, _ in points]
    modules = _modules(line, program)
    spans = (
        _numbered(modules, places, stack)
        or _repeated(nodes, places, program, line)
        or _single(nodes, places, program, line)
    )
    starts: dict[str, int] = {}
    for module in modules:
        starts[module.name] = min(module.first, starts.get(module.name, module.first))
    return _measure(program, line, spans, points, starts, stack)


def _modules(line: Mainline, program: Program) -> list[_Module]:
    """Every call of every module on the mainline."""
    found: dict[str, _Module] = {}
    nodes: dict[str, list[int]] = {}
    uses: dict[str, dict[str, list[int]]] = {}  # module -> weight -> where it is used
    for node, at in line.positions.items():
        paths = module_paths(node)
        weights = _weights([node], program, line)
        for depth, (path, kind) in enumerate(paths):
            module = found.setdefault(path, _Module(path, kind, at, at))
            module.last = max(module.last, at)
            module.composite |= depth + 1 < len(paths)
            module.weighted |= any(value(w).ndim > 1 for w in weights)
            nodes.setdefault(path, []).append(at)
            for weight in weights:
                uses.setdefault(path, {}).setdefault(weight.name, []).append(at)
    calls: list[_Module] = []
    for path, module in found.items():
        calls.extend(_calls(module, nodes[path], list(uses.get(path, {}).values())))
    return calls


def _calls(module: _Module, nodes: list[int], uses: list[list[int]]) -> list[_Module]:
    """One entry for each call of a module: it runs as often as every one of its weights is used."""
    times = len(uses[0]) if uses else 1
    if times == 1 or any(len(u) != times for u in uses):
        return [module]
    starts = [min(u[i] for u in uses) for i in range(times)]
    ends = [max(u[i] for u in uses) for i in range(times)]
    if any(end >= start for end, start in zip(ends, starts[1:], strict=False)):
        return [module]  # uses interleave: one call that applies its weights several times
    calls = []
    for i, start in enumerate(starts):
        following = starts[i + 1] if i + 1 < times else module.last + 1
        last = max(at for at in nodes if at < following)
        calls.append(replace(module, first=start if i else module.first, last=last, call=i))
    return calls


def _numbered(modules: list[_Module], points: list[int], stack: str | None) -> list[_Span]:
    """The numbered modules that cut points separate."""
    numbered = [
        m for m in modules
        if m.path.rpartition(".")[2].isdigit() and m.weighted
        and (stack is None or m.inside(stack))
    ]  # fmt: skip
    if any(m.composite for m in numbered):  # if some are composite, plain layers are not blocks
        numbered = [m for m in numbered if not m.plain]
    paths = {m.path for m in numbered}
    outermost = [m for m in numbered if not any(m.inside(p) for p in paths)]
    chosen = [leaf for m in outermost for leaf in _descend(m, numbered, points)]
    chosen.sort(key=lambda m: m.first)
    return _separate(chosen, points)


def _descend(module: _Module, numbered: list[_Module], points: list[int]) -> list[_Module]:
    """Replace a stage (``stages.1``) by its layers if those are blocks of one class."""
    inner = [
        m for m in numbered
        if m.inside(module.path) and module.first <= m.first and m.last <= module.last
    ]  # fmt: skip
    paths = {m.path for m in inner}
    inner = [m for m in inner if not any(m.inside(p) for p in paths)]
    same_kind = len({m.kind for m in inner}) == 1 and all(m.composite for m in inner)
    inner.sort(key=lambda m: m.first)
    if inner and same_kind and len(_separate(inner, points)) == len(inner):
        return [leaf for m in inner for leaf in _descend(m, numbered, points)]
    return [module]


def _separate(modules: list[_Module], points: list[int]) -> list[_Span]:
    """End each module at a cut point after it; merge modules without a cut point between them.

    Operations between two modules (downsampling, for example) belong to the second one's block;
    after a plain layer (the norm and activation of a convolution), to the first one's.
    """
    if not modules:
        return []
    spans: list[_Span] = []
    start: _Module | None = None
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        start = start or module
        if following is None:
            exits = [p for p in points if p >= module.last]
        else:
            exits = [p for p in points if module.last <= p < following.first]
        if exits:
            name = start.name if start is module else f"{start.name}..{module.name}"
            exit_ = exits[-1] if module.plain and following else exits[0]
            spans.append(_Span(name, start.first, exit_))
            start = None
    return spans


Stretch = tuple[tuple[object, ...], int, int]  # (what it computes, first, last)


def _stretches(nodes: Sequence[fx.Node], points: list[int]) -> list[Stretch]:
    """The stretches between neighbouring cut points, by operations and shapes.

    Sizes are compared at the example's values, since names of symbolic sizes differ.
    """
    stretches: list[Stretch] = []
    for low, high in zip([-1, *points], points, strict=False):
        ops: list[object] = []
        for node in nodes[low + 1 : high + 1]:
            if node.op == "call_function" and isinstance(value(node), torch.Tensor):
                ops.append((node.target, tuple(hint(s) for s in value(node).shape)))
        stretches.append((tuple(ops), low + 1, high))
    return stretches


def _repeated(
    nodes: Sequence[fx.Node], points: list[int], program: Program, line: Mainline
) -> list[_Span]:
    """The longest run of equal stretches, for models whose blocks have no numbered names."""
    stretches = _stretches(nodes, points)
    hashes = [h for h, _, _ in stretches]
    best = (0, 0, 0, 0)  # (stretches covered, -period, start, repeats)
    for period in range(1, len(hashes) // 2 + 1):
        start = 0
        while start + 2 * period <= len(hashes):
            unit, repeats = hashes[start : start + period], 1
            while hashes[start + repeats * period : start + (repeats + 1) * period] == unit:
                repeats += 1
            if repeats > 1:
                best = max(best, (repeats * period, -period, start, repeats))
            start += max(1, (repeats - 1) * period) if repeats > 1 else 1
    _, negative, start, repeats = best
    spans = []
    for i in range(repeats):
        unit_ = stretches[start - i * negative : start - (i + 1) * negative]
        spans.append(_Span(f"block{i}", unit_[0][1], unit_[-1][2]))
    weighted = all(_weights(nodes[s.first : s.last + 1], program, line) for s in spans)
    return spans if weighted else []


def _single(
    nodes: Sequence[fx.Node], points: list[int], program: Program, line: Mainline
) -> list[_Span]:
    """Every stretch that holds weights; one without joins the stretch before it."""
    spans: list[_Span] = []
    for low, high in zip([-1, *points], points, strict=False):
        stretch = nodes[low + 1 : high + 1]
        if not _weights(stretch, program, line):
            if spans:
                spans[-1] = replace(spans[-1], last=high)
            continue
        paths = [p[-1][0] for n in stretch if n.op == "call_function" and (p := module_paths(n))]
        name = paths[-1] if paths else f"block{len(spans)}"
        used = {s.name for s in spans}
        name = name if name not in used else f"{name}#{len(spans)}"
        spans.append(_Span(name, low + 1, high))
    return spans


def _weights(nodes: Sequence[fx.Node], program: Program, line: Mainline) -> list[fx.Node]:
    """The parameters that these nodes read, directly or in what is computed from them; and the
    buffers that the weight of a product is computed from, as quantised ones are."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            of_product = bool(op(node).product) and getattr(value(source), "ndim", 0) > 1
            for owned in line.static.get(source, ()):
                if of_product or program.inputs[owned.name].kind == "weight":
                    found[owned] = None
    return list(found)


def _measure(
    program: Program,
    line: Mainline,
    spans: list[_Span],
    points: list[tuple[int, fx.Node]],
    starts: dict[str, int],
    stack: str | None,
) -> DepthMap:
    """Blocks with sizes, parameters and FLOPs; a weight counts where it is used first."""
    nodes, sizes = list(program.graph.nodes), Sizes(program)
    counted: set[fx.Node] = set()

    def block(name: str, first: int, last: int, node: fx.Node) -> Block:
        stretch = nodes[first : last + 1]
        fresh = [w for w in _weights(stretch, program, line) if w not in counted]
        counted.update(fresh)
        params = sum(numel(value(w)) for w in fresh)
        shape = tuple(map(sizes.word, value(node).shape))
        return Block(name, node.name, shape, params, sizes.flops(stretch), first, last)

    lengths = tuple(sizes.lengths.items())
    named = tuple((at, node.name) for at, node in points)
    end = len(nodes) - 1
    if not spans:
        whole = block(program.model, 0, end, line.sink)
        return DepthMap(
            program.model, whole, (), None, named, starts, stack, line.source(), lengths
        )
    before = [at for at, _ in points if at < spans[0].first]
    stem = block("stem", 0, before[-1], nodes[before[-1]]) if before else None
    blocks, low = [], before[-1] + 1 if before else 0
    for span in spans:
        blocks.append(block(span.name, low, span.last, nodes[span.last]))
        low = span.last + 1
    head = block("head", low, end, line.sink) if line.positions[line.sink] >= low else None
    made = (program.model, stem, tuple(blocks), head, named, starts, stack, line.source(), lengths)
    return DepthMap(*made)
