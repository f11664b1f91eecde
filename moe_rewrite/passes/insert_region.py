"""Replace a convolutional region by experts that run it on the patches of the plan.

Without experts the call runs the region as captured: exact.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.channels import Channels, find_channels
from ..analysis.conv_region import Region, find_region, map_size
from ..config import RegionExperts
from ..errors import ConversionError
from ..experts.region.call import RegionCall
from ..experts.region.halo import halo_code
from ..experts.region.isolated import isolated_code
from ..experts.region.patch_code import DRY, device_of, dry_run, weights_of, whole_code
from ..ir.aten import value
from ..ir.ops import mutated, op_name
from ..ir.program import Code, Numerics, Program
from ..ir.sites import Found, Part, RegionSite
from ..routing.plan_views import WholePlan
from .base import Decisions, Pass, sites_to_convert
from .wiring import expert_input, plan_view


@dataclass(frozen=True)
class Replacement:
    """The call that replaces a region, the region's weights, and the experts' parts of them."""

    region: Region
    call: RegionCall
    weights: list[fx.Node]
    parts: list[Part]


@dataclass(frozen=True)
class FindRegion(Pass):
    """Exact: in-place operations of the region become out-of-place ones, with the same values.

    Raises ConversionError if there is no such region, or it cannot run on patches.
    """

    experts: RegionExperts
    num_experts: int
    name = "sites"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        grid = getattr(decisions.chosen, "grid", None) or 1
        statistics = self.experts.statistics == "patches"
        region = find_region(program, self.experts.names, statistics)
        small = min(map_size(region.exit))
        if grid > small:
            raise ConversionError(
                f"grid={grid}: the output of region {region.name!r} is a map of "
                f"{_shape(region.exit)}: choose a grid of at most {small}, or end the region "
                "earlier"
            )
        weights = weights_of(program, region)
        if quantized := [program.inputs[w.name].name for w in weights if program.quantized(w)]:
            raise ConversionError(
                f"region {region.name!r}: {quantized[0]} is quantised, so that copies of it could not "
                "be trained: convert with LoRAExperts, which stand beside it, or convert a model "
                "that is not quantised"
            )
        parts, sizes = _parts(program, region, self.experts, self.num_experts, weights)
        if all(part.kind != "weight" for part in parts):
            ends = f": it ends where it does since {region.ends}" if region.ends else ""
            raise ConversionError(
                f"region {region.name!r} holds no weights, so that experts of it would learn "
                f"nothing{ends}. Split elsewhere or name a region (RegionExperts(region=...))"
            )
        build = halo_code if self.experts.halo else isolated_code
        shares = [_share(w, p) for w, p in zip(weights, parts, strict=True)]
        patches = build(program, region, grid, sizes, shares)
        whole = whole_code(program, region)
        written = {w for n in region.nodes for w in mutated(n)}
        call = RegionCall(
            whole, patches, map_size(region.exit), self.experts.combine == "concat",
            tuple(i for i, w in enumerate(weights) if w in written),
        )  # fmt: skip
        site = RegionSite(
            region.name, tuple(p for p in parts if p.kind != "constant"),
            _shape(region.entry), _shape(region.exit),
            _dense_macs(region, whole, weights), patches.macs, _score_macs(program), region.ends,
        )  # fmt: skip
        return self.done(program, found=Found({site: Replacement(region, call, weights, parts)}))


@dataclass(frozen=True)
class InsertRegion(Pass):
    """Reordered: patches are batches of another shape. With statistics over patches, approximate,
    except where an expert takes every patch."""

    statistics: bool = False
    name = "insert experts"

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        return "approximate" if self.statistics else "reordered"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        graph, inputs = program.graph, dict(program.inputs)
        sites = sites_to_convert(program, decisions)
        how = tuple((site.name, _how(new.region)) for site, new in sites.items())
        for site, new in sites.items():
            own = [
                None if p.kind == "constant" else expert_input(program, inputs, site.name, p.name)
                for p in new.parts
            ]
            entry, exit_ = new.region.entry, new.region.exit
            plan = plan_view(program, WholePlan())
            with graph.inserting_after(exit_):
                given: Any = (entry, plan, tuple(new.weights), tuple(own))
                routed = graph.call_function(new.call, given)
            routed.meta = dict(exit_.meta)
            exit_.replace_all_uses_with(routed)
            for node in reversed(new.region.nodes):
                if not node.users:
                    graph.erase_node(node)
        return self.done(program, inputs=inputs, sites=tuple(sites), lowered=how, found=None)


def _how(region: Region) -> str:
    """Text for the report: how a region is computed."""
    taken = Counter(op_name(n) for n in region.nodes if region.takes_statistics(n))
    text = "equal groups, the patches of an expert in one batch"
    if not taken:
        return text
    listed = ", ".join(f"{count} {name}" for name, count in taken.items())
    return f"{text}; approximate: statistics of {listed} over the patches taken of each sample"


def _parts(
    program: Program, region: Region, experts: RegionExperts, num_experts: int,
    weights: list[fx.Node],
) -> tuple[list[Part], dict[fx.Node, int]]:  # fmt: skip
    """What an expert has of each weight, and the sizes that are arguments of nodes of its code."""
    channels = find_channels(program, region)
    kept = _kept(channels, region, experts, num_experts)
    parts = [_part(program, channels, kept, w) for w in weights]
    counts = {n: channels.root(g) for n, g in channels.counts.items()}
    return parts, {n: kept[g] for n, g in counts.items() if g in kept}


def _dense_macs(region: Region, whole: Code, weights: list[fx.Node]) -> int:
    shape, dtype = value(region.entry).shape[1:], value(region.entry).dtype
    entry = torch.empty(DRY, *shape, dtype=dtype, device="meta")
    full = [_share(w, Part("", "", ())) for w in weights]
    return dry_run(whole, [entry], full, device_of(region))[1]


def _shape(node: fx.Node) -> str:
    return "x".join(str(s) for s in value(node).shape[1:])


def _score_macs(program: Program) -> int:
    """Multiply-adds of an inner product with every position at the cut."""
    assert program.cut is not None
    return math.prod(int(s) for s in value(program.node(program.cut.node)).shape[1:])


def _kept(
    channels: Channels, region: Region, experts: RegionExperts, num_experts: int
) -> dict[int, int]:
    """Group -> channels that an expert keeps, for groups that experts have a share of."""
    exit_ = channels.root(channels.of[region.exit])
    kept: dict[int, int] = {}
    if experts.combine == "concat":
        if exit_ in channels.fixed:
            raise ConversionError(
                f"combine='concat': the output channels of region {region.name!r} are not its own "
                f"({channels.fixed[exit_]}): use combine='sum' or another region"
            )
        size, rest = divmod(channels.sizes[exit_], num_experts)
        if rest:
            raise ConversionError(
                f"combine='concat': {channels.sizes[exit_]} output channels do not divide among "
                f"{num_experts} experts"
            )
        kept[exit_] = size
    hidden = [g for g in channels.hidden() if g != exit_]
    if experts.width < 1 and not hidden:
        raise ConversionError(
            f"width={experts.width}: region {region.name!r} has no hidden channels, all are tied "
            "to its entry or exit"
        )
    if experts.width < 1:
        kept |= {g: max(1, round(experts.width * channels.sizes[g])) for g in hidden}
    return kept


def _part(program: Program, channels: Channels, kept: dict[int, int], weight: fx.Node) -> Part:
    dims = {d: channels.root(g) for (w, d), g in channels.dims.items() if w is weight}
    of = program.inputs[weight.name]
    return Part(of.name, of.kind, tuple((d, kept[g]) for d, g in sorted(dims.items()) if g in kept))


def _share(weight: fx.Node, part: Part) -> torch.Tensor:
    shape = list(value(weight).shape)
    for dim, size in part.kept:
        shape[dim] = size
    return torch.empty(shape, dtype=value(weight).dtype, device="meta")
