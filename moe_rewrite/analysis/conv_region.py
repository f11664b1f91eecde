"""Find a convolutional region: one feature map in, one out, and between them only operations on
windows of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import ConversionError
from ..ir.aten import module_paths, reach, value
from ..ir.ops import alias_chain, first, mutated, op_name, out_of_place
from ..ir.program import Program, routing_plan
from .places import NCHW, OfSample, Place, SpatialDims, SpatialMap
from .sample_values import free_of_sizes
from .spatial import propagate
from .statistics import HOW, is_norm

OTHERS = "Name another region with RegionExperts(region=...), or convert with experts=LoRAExperts()"


@dataclass(frozen=True)
class Region:
    """A convolutional region.

    entry, exit: the feature maps that it reads and returns.
    nodes: in graph order, the exit last, with the nodes that compute its weights.
    places: the dimensions of its feature maps, the entry's too.
    ends: why it goes no further; empty if it was named.
    samples: the values in it that a sample has once.
    """

    name: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    places: dict[fx.Node, SpatialDims]
    ends: str
    samples: frozenset[fx.Node] = frozenset()

    def maps(self) -> list[fx.Node]:
        return [n for n in self.nodes if n in self.places]

    def place(self, node: fx.Node) -> Place | None:
        """The place of a value that is computed from the entry; None for others."""
        return OfSample() if node in self.samples else self.places.get(node)

    def takes_statistics(self, node: fx.Node) -> bool:
        """Whether a node of the region takes statistics over all positions of a map."""
        source = first(node)
        if not isinstance(source, fx.Node) or source not in self.places:
            return False
        return node in self.samples or (node in self.places and is_norm(node))


def map_size(node: fx.Node) -> tuple[int, int]:
    """(height, width) of an NCHW feature map."""
    height, width = value(node).shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        raise ConversionError(f"{node.name}: the map's size is not fixed: ({height}, {width})")
    return height, width


def find_region(program: Program, names: tuple[str, ...], statistics: bool = False) -> Region:
    """The region of the named modules, or from the cut as far as it goes.

    statistics: it may hold operations that take statistics over all positions.

    In-place operations inside it become out-of-place ones: the graph is edited, its values stay the
    same. Raises ConversionError with the reason if there is no such region.
    """
    assert program.cut is not None and program.depth is not None
    cut = program.node(program.cut.node)
    if value(cut).ndim != 4:
        shape = "x".join(str(s) for s in value(cut).shape)
        raise ConversionError(
            f"RegionExperts: the cut carries {shape}, not a feature map (batch, channels, height, "
            "width): split at a convolutional stage"
        )

    def followed(statistics: bool = statistics) -> SpatialMap:
        nodes = [n for n in program.graph.nodes if n.target is not routing_plan]
        return propagate(nodes, cut, statistics)

    points = {name for _, name in program.depth.points}

    def ending(places: SpatialMap) -> list[fx.Node]:
        return [n for n, p in places.items() if n.name in points and n is not cut and p == NCHW]

    _write_nowhere(program, followed(statistics=True))
    if statistics:
        free_of_sizes(program, followed())
    places = followed()
    if names:
        return _named(program, names, places, statistics)
    exits = ending(places)
    reasons = [r for r in places.values() if isinstance(r, str)]
    if reasons and not statistics and len(ending(followed(statistics=True))) > len(exits):
        reasons[0] = f"{reasons[0]}. {HOW}"
    for exit_ in reversed(exits):
        try:
            ends = reasons[0] if reasons else ""
            return _region(program, program.cut.label, cut, exit_, ends, statistics)
        except ConversionError as error:
            reasons.insert(0, str(error))
    raise ConversionError(
        f"RegionExperts: no region starts at the cut ({program.cut.label}): "
        f"{reasons[0] if reasons else 'no cut point follows it'}. Split earlier or name a region"
    )


def _named(
    program: Program, names: tuple[str, ...], places: SpatialMap, statistics: bool
) -> Region:
    def inside(node: fx.Node, name: str) -> bool:
        return any(p == name or p.startswith(name + ".") for p, _ in module_paths(node))

    assert program.cut is not None
    cut = program.node(program.cut.node)
    deep = set(places) - {cut}
    for name in names:
        if not any(inside(n, name) for n in deep):
            raise ConversionError(
                f"region={name!r}: no module of this name works on the features after the cut "
                f"({program.cut.label})"
            )
    seeds = {n for n in deep if any(inside(n, name) for name in names)}
    after = {m for n in seeds for m in reach(n, lambda n: n.users)}
    before = {m for n in seeds for m in reach(n, lambda n: n.all_input_nodes)}
    nodes = after & before & deep
    label = ", ".join(names)
    entries = {s for n in nodes for s in n.all_input_nodes if s in places and s not in nodes}
    exits = {n for n in nodes if any(u not in nodes for u in n.users)}
    for word, found in (("entry", entries), ("exit", exits)):
        if len(found) != 1:
            listed = ", ".join(sorted(n.name for n in found))
            raise ConversionError(
                f"region={label!r}: expected one {word}, found {len(found)} ({listed}): name "
                "modules with a single feature map in and a single one out"
            )
    return _region(program, label, entries.pop(), exits.pop(), "", statistics)


def _region(
    program: Program, name: str, entry: fx.Node, exit_: fx.Node, ends: str, statistics: bool
) -> Region:
    """Raises ConversionError unless every operation from entry to exit keeps positions, or takes
    `statistics`."""
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    between = reach(entry, lambda n: n.users) & reach(exit_, lambda n: n.all_input_nodes)
    between.discard(entry)
    if value(entry).ndim != 4:
        raise ConversionError(
            f"region {name!r} starts at {entry.name}, which is no feature map. {OTHERS}"
        )
    _require_unwritten(program, name, between, entry, exit_)
    ordered = sorted(between, key=order.__getitem__)
    places = propagate(ordered, entry, statistics)
    lost = _lost(ordered, places)
    if lost:
        taken = lost[0] not in _lost(ordered, propagate(ordered, entry, statistics=True))
        raise ConversionError(
            f"region {name!r}: {lost[0]}, which a region cannot hold. {HOW if taken else OTHERS}"
        )
    if places[exit_] != NCHW:
        raise ConversionError(
            f"region {name!r} ends at {exit_.name}, whose dimensions were moved. {OTHERS}"
        )
    for node in between - {exit_}:
        outside = [u for u in node.users if u not in between]
        if outside:
            raise ConversionError(
                f"region {name!r}: {outside[0].name} reads {node.name} inside it: expected one exit"
            )
    nodes = between | _weights_side(program, name, between, entry)
    kept = {n: p for n, p in places.items() if isinstance(p, SpatialDims)}
    samples = frozenset(n for n, p in places.items() if isinstance(p, OfSample))
    nodes_in_order = tuple(sorted(nodes, key=order.__getitem__))
    return Region(name, entry, exit_, nodes_in_order, kept, ends, samples)


def _lost(between: list[fx.Node], places: SpatialMap) -> list[str]:
    """Why nodes between entry and exit cannot be computed patch by patch."""
    lost = [r for r in places.values() if isinstance(r, str)]
    sizes = [n for n in between if n not in places]
    return lost + [f"{n.name} ({op_name(n)}) reads the size of a map" for n in sizes]


def _weights_side(
    program: Program, name: str, between: set[fx.Node], entry: fx.Node
) -> set[fx.Node]:
    """The nodes that compute the region's operands from weights only."""
    found: set[fx.Node] = set()
    stack = [s for n in between for s in n.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in between or node in found or node is entry:
            continue
        if node.op == "placeholder":
            if program.inputs[node.name].kind not in ("weight", "buffer", "constant"):
                raise ConversionError(
                    f"region {name!r} reads {node.name} besides {entry.name}: expected one entry"
                )
            continue
        if node.op != "call_function":
            raise ConversionError(
                f"region {name!r} reads a weight that {node.name} computes under torch.no_grad() or "
                f"autocast (such as spectral norm in training), of which experts have no copies. {OTHERS}"
            )
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def _require_unwritten(
    program: Program, name: str, between: set[fx.Node], entry: fx.Node, exit_: fx.Node
) -> None:
    """Raises ConversionError if a write in place that `_write_nowhere` left changes what the region
    reads or holds."""
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    inside = {_owner(n) for n in (*between, entry)}
    until = order[exit_] if _owner(exit_) is not _owner(entry) else len(order)
    for node in program.graph.nodes:
        if not order[entry] < order[node] <= until:
            continue
        for written in mutated(node):
            if _owner(written) in inside:
                raise ConversionError(
                    f"region {name!r}: {node.name} writes in place to {written.name}, which shares "
                    "memory with a map of the region: expected a write to a whole map; compute a "
                    "new tensor instead"
                )


def _write_nowhere(program: Program, places: SpatialMap) -> None:
    """Turn in-place operations on the feature maps into out-of-place ones.

    Later readers of the tensor that was written to, or of a view of it, read the result, or the
    same view of the result: the same values. Writes through a view stay, and those that only move
    dimensions.
    """
    for node in [n for n, p in places.items() if not isinstance(p, str)]:
        written, plain = mutated(node), out_of_place(node)
        turned = torch.Tag.inplace_view in getattr(node.target, "tags", ())
        if not written or plain is None or turned:
            continue
        *steps, owner = _shown(written[0])
        if owner.op == "placeholder" or not all(map(mutated, steps)):
            continue
        node.target = plain
        _read_result(program.graph, node, owner)


def _read_result(graph: fx.Graph, result: fx.Node, owner: fx.Node) -> None:
    """Let the nodes after `result` read it instead of `owner`, and its views instead of owner's."""
    nodes = list(graph.nodes)
    before, after = nodes[: nodes.index(result)], set(nodes[nodes.index(result) + 1 :])
    now, last = {owner: result}, result
    for node in before:
        if _owner(node) is not owner or node is owner:
            continue
        if written := mutated(node):
            now[node] = now[written[0]]
            continue
        with graph.inserting_after(last):
            last = now[node] = graph.node_copy(node, lambda n: now.get(n, n))
    for old, new in now.items():
        for user in [u for u in old.users if u in after]:
            user.replace_input_with(old, new)
    for view in reversed(dict.fromkeys(v for pair in now.items() for v in pair)):
        if not view.users and view not in (owner, result) and not mutated(view):
            graph.erase_node(view)


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows."""
    return _shown(node)[-1]


def _shown(node: fx.Node) -> list[fx.Node]:
    """From this node back to the one whose memory it shows. Operators that copy only where they
    have to (contiguous, to, reshape) count as views where they copied nothing on the example."""
    return [n for n in alias_chain(node) if _memory(n) == _memory(node)]


def _memory(node: fx.Node) -> Any:
    made = value(node)
    part = made[0] if isinstance(made, (tuple, list)) else made
    return part.untyped_storage()._cdata if isinstance(part, torch.Tensor) else None
