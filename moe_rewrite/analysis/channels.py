"""Which channels of a region depend on one another, so that experts can keep a share of them.

Channels form groups. A convolution reads one group and writes another; pointwise operations, norms
and pooling keep a value's group; operands that are added join their groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..errors import ConversionError
from ..ir.aten import value
from ..ir.ops import argument, op, op_name
from ..ir.program import Program
from .conv_region import Region
from .spatial import axis


@dataclass
class Channels:
    """Groups of channels, as a union-find structure.

    of: the group of each map's channels.
    dims: (weight node, dimension) -> group.
    sizes: channels of each group.
    parents: the group that each was joined with, or itself.
    fixed: groups that no expert may shrink, with the reason.
    counts: nodes that have the size of a group as an argument (depthwise convolutions, layer
        norms), with that group.
    """

    of: dict[fx.Node, int] = field(default_factory=dict)
    dims: dict[tuple[fx.Node, int], int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)
    counts: dict[fx.Node, int] = field(default_factory=dict)

    def new(self, size: int) -> int:
        self.sizes.append(size)
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def join(self, a: int, b: int) -> int:
        a, b = self.root(a), self.root(b)
        if self.sizes[a] != self.sizes[b]:
            raise ConversionError(f"channels of {self.sizes[a]} and {self.sizes[b]} are joined")
        self.parents[b] = a
        if b in self.fixed:
            self.fixed.setdefault(a, self.fixed[b])
        return a

    def fix(self, group: int, reason: str) -> None:
        self.fixed.setdefault(self.root(group), reason)

    def hidden(self) -> list[int]:
        """The groups that may shrink."""
        roots = {self.root(g) for g in self.of.values()}
        return sorted(g for g in roots if g not in self.fixed)


def find_channels(program: Program, region: Region) -> Channels:
    """Groups of a region's channels; those of its entry are fixed, those of its exit are not."""
    found = Channels()
    found.of[region.entry] = found.new(int(value(region.entry).shape[1]))
    found.fix(found.of[region.entry], "the region's entry")
    for node in region.maps():
        if node is not region.entry:
            found.of[node] = _group(program, region, node, found)
    return found


def _group(program: Program, region: Region, node: fx.Node, found: Channels) -> int:
    of, name = op(node), op_name(node)
    sources = [n for n in node.all_input_nodes if n in region.places]
    inside = found.of[sources[0]]
    if of.product == "filter":
        return _conv(node, inside, found)
    if of.product == "linear":
        weight = argument(node, "weight")
        out = found.new(int(value(weight).shape[0]))
        _tie(found, weight, {0: out, 1: inside})
        _tie(found, argument(node, "bias"), {0: out})
        return out
    channels = region.places[node].channels
    size = value(node).shape[channels] if not isinstance(value(node), (tuple, list)) else None
    keeps = size == found.sizes[found.root(inside)]
    if of.channels and keeps and not (of.positions == "slice" and axis(node) == channels):
        if of.normalized:
            found.counts[node] = inside
        for weight in node.all_input_nodes:
            if weight not in region.places:
                _tie(found, weight, {0: inside})
        return inside
    same_shape = all(
        value(n).ndim == value(node).ndim and value(n).shape[channels] == size for n in sources
    )
    if keeps and same_shape and of.positions not in ("cat", "pad", "split"):
        for other in sources[1:]:
            found.join(inside, found.of[other])
        for weight in node.all_input_nodes:
            if weight not in region.places:
                at = channels - value(node).ndim + value(weight).ndim
                if at >= 0 and value(weight).shape[at] != 1:
                    _tie(found, weight, {at: inside})
        return inside
    for source in sources:
        found.fix(found.of[source], f"{node.name} ({name}) rearranges channels")
    out = found.new(0 if size is None else int(size))
    found.fix(out, f"{node.name} ({name}) rearranges channels")
    return out


def _conv(node: fx.Node, inside: int, found: Channels) -> int:
    weight, groups = argument(node, "weight"), argument(node, "groups")
    out_channels, per_group = (int(s) for s in value(weight).shape[:2])
    if groups == 1:
        out = found.new(out_channels)
        _tie(found, weight, {0: out, 1: inside})
    elif per_group == 1 and out_channels == groups:
        out = inside
        found.counts[node] = inside
        _tie(found, weight, {0: out})
    else:
        out = found.new(out_channels)
        for group in (inside, out):
            found.fix(group, f"{node.name} is a grouped convolution")
    _tie(found, argument(node, "bias"), {0: out})
    return out


def _tie(found: Channels, weight: Any, dims: dict[int, int]) -> None:
    """Assign a weight's dimensions to these groups; a computed weight makes the groups fixed."""
    if weight is None:
        return
    for dim, group in dims.items():
        if weight.op != "placeholder":
            found.fix(group, f"{weight.name} is computed from a weight")
        elif (weight, dim) in found.dims:
            found.join(found.dims[weight, dim], group)
        else:
            found.dims[weight, dim] = group
