"""Which channels of a region depend on one another, so that experts can keep a share of them.

Channels form groups. A convolution reads one group and writes another; pointwise operations, norms
and pooling keep a value's group; operands that are added join their groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import ConversionError
from ..ir.aten import value
from ..ir.ops import argument, op, op_name
from ..ir.program import Program
from .conv_region import Region
from .places import channel_dim
from .spatial import axis, padding_along


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
    for node in region.nodes:
        if node is not region.entry and region.place(node) is not None:
            found.of[node] = _group(program, region, node, found)
    return found


def _group(program: Program, region: Region, node: fx.Node, found: Channels) -> int:
    of, name = op(node), op_name(node)
    sources = [n for n in node.all_input_nodes if region.place(n) is not None]
    inside, dim = found.of[sources[0]], _dim(region, sources[0])
    follows = sources[0] not in region.samples or _maps_channels(node, sources[0], dim)
    if follows and of.product == "filter":
        return _conv(node, inside, found)
    if follows and of.product == "linear":
        weight = argument(node, "weight")
        out = found.new(int(value(weight).shape[0]))
        _tie(found, weight, {0: out, 1: inside})
        _tie(found, argument(node, "bias"), {0: out})
        return out
    sizes, own = [_count(region, n) for n in (node, *sources)], _dim(region, node)
    known = own is not None and dim is not None and follows
    if known and len(set(sizes)) == 1 and not _rearranges(node, own):
        if region.takes_statistics(node) and op_name(node) in ("group_norm", "layer_norm"):
            found.fix(inside, f"{node.name} normalizes over several channels")
        elif of.normalized:
            found.counts[node] = inside
        for other in sources[1:]:
            found.join(inside, found.of[other])
        for operand in node.all_input_nodes:
            if region.place(operand) is None:
                _tie_operand(found, node, operand, own, inside)
        return inside
    out = found.new(max(_count(region, node), 0))
    for group in (out, *(found.of[n] for n in sources)):
        found.fix(group, f"{node.name} ({name}) rearranges channels")
    return out


def _dim(region: Region, node: fx.Node) -> Any:
    """The dimension that has a value's channels; None if that is not known."""
    place = region.place(node)
    return channel_dim(place, node) if place and isinstance(value(node), torch.Tensor) else 1


def _maps_channels(node: fx.Node, source: fx.Node, dim: int | None) -> bool:
    """Whether an operation on values of samples treats their channels as one on a map would."""
    of, ndim = op(node), value(source).ndim
    if of.product == "filter":
        return dim == 1 and ndim == 4 and set(value(argument(node, "weight")).shape[2:]) == {1}
    return of.product != "linear" or dim == ndim - 1


def _count(region: Region, node: fx.Node) -> int:
    """A value's channels; 0 of the list that a split gives, -1 if they are not known."""
    made, dim = value(node), _dim(region, node)
    if not isinstance(made, torch.Tensor):
        return 0
    return -1 if dim is None else int(made.shape[dim])


def _rearranges(node: fx.Node, channels: int) -> bool:
    """Whether channels of the result may be others of the operands, although as many."""
    positions = op(node).positions
    if positions == "slice":
        return axis(node) == channels
    if positions == "pad":
        return any(padding_along(node, channels))
    return positions in ("cat", "split", "shuffle")


def _tie_operand(
    found: Channels, node: fx.Node, operand: fx.Node, channels: int, group: int
) -> None:
    """Assign the dimension of an operand that has a value for each channel, if one has."""
    given = value(operand)
    if not isinstance(given, torch.Tensor):
        return
    at = 0 if op(node).channels else channels - value(node).ndim + given.ndim
    if 0 <= at < given.ndim and given.shape[at] != 1:
        _tie(found, operand, {at: group})


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
