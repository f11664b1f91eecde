"""Replace feed-forward regions by routed experts that start as copies of them.

Without experts the call runs the dense region. With them it equals that region while they are
copies and a row's gates sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from ..analysis.feedforward import FeedForward, Linear, find_feedforward
from ..analysis.infer_layout import Layouts
from ..analysis.linear_ops import Product, find_product, innermost_module
from ..analysis.static_values import static_values
from ..config import FFNExperts, RouterSpec
from ..experts.carved import CarvedExperts
from ..experts.ffn.call import FeedForwardCall
from ..ir.aten import value
from ..ir.gate_layout import GateLayout
from ..ir.ops import is_pointwise
from ..ir.program import Input, Numerics, Program
from ..ir.sites import FeedForwardSite, Found, Part, Rejection
from ..routing.layer_plan import layer_gates, layer_logits
from ..routing.plan_views import LayerGates, SortedGates
from .base import Decisions, Pass, sites_to_convert
from .split import segments
from .wiring import expert_input, plan_view

Use = tuple[FeedForward, GateLayout | None]  # no layout: the region routes its rows itself


@dataclass(frozen=True)
class FindFeedForwards(Pass):
    """Exact: the graph is only read."""

    experts: FFNExperts | CarvedExperts
    name = "sites"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        sites, rejected = self._find(program, decisions.chosen)
        reasons = tuple(Rejection(n, r) for n, r in rejected.items())
        return self.done(program, found=Found(sites, reasons))

    def _find(
        self, program: Program, router: RouterSpec
    ) -> tuple[dict[FeedForwardSite, list[Use]], dict[str, str]]:
        """The regions that can hold experts, and why others cannot."""
        _, deep = segments(program)
        layouts = Layouts(program, deep, router)
        uses: dict[str, list[FeedForward]] = {}
        rejected: dict[str, str] = {}
        for found in find_feedforward(program, deep):
            if isinstance(found, FeedForward):
                uses.setdefault(_free_name(program, found, uses), []).append(found)
            else:
                rejected.setdefault(*found)
        outside = _products_outside(program, deep, uses)
        sites: dict[FeedForwardSite, list[Use]] = {}
        for number, (name, regions) in enumerate(uses.items()):
            reason = self.experts.refuses(name, len(uses) - 1 - number)
            weights = {r.weights[p.weight] for r in regions for p in (*r.ups, r.down)}
            reason = reason or next((outside[w] for w in outside if w in weights), None)
            laid = [None if self.experts.by_layer else _layout(layouts, r) for r in regions]
            reason = reason or next((x for x in laid if isinstance(x, str)), None)
            reason = reason or self._not_cut(regions[0])
            if reason is not None:
                rejected[name] = reason
            else:
                site = _site(program, name, regions[0], self._cut, self._carves)
                sites[site] = [
                    (r, x) for r, x in zip(regions, laid, strict=True) if not isinstance(x, str)
                ]
        return sites, rejected

    @property
    def _carves(self) -> bool:
        return isinstance(self.experts, CarvedExperts)

    @property
    def _cut(self) -> int:
        """Experts that a region's hidden units are divided among."""
        own = self.experts
        return own.experts if isinstance(own, CarvedExperts) else own.granularity

    def _not_cut(self, region: FeedForward) -> str | None:
        """Why hidden units of a region cannot be told apart, if experts need that."""
        own, cut = self.experts, self._cut
        if isinstance(own, FFNExperts) and cut == 1 and not own.reinit:
            return None
        if not _hidden_dims(region):
            return (
                f"{'carving needs' if self._carves else 'granularity and reinit need'} hidden units "
                "that are computed one by one, from weights of their own (gate and up in one tensor "
                "are none)"
            )
        if isinstance(own, CarvedExperts):
            return own.uncut(region.hidden)
        rest = region.hidden % cut
        return f"hidden width {region.hidden}: expected a multiple of {cut}" if rest else None


def _products_outside(
    program: Program, deep: list[fx.Node], uses: dict[str, list[FeedForward]]
) -> dict[fx.Node, str]:
    """Weights of products that are in none of these regions, with a reason to leave regions that
    hold them as they are: experts would replace them at one place and not at another."""
    inside = {n for regions in uses.values() for r in regions for n in r.nodes}
    static, found = static_values(program), {}
    for node in deep:
        product = None if node in inside or not uses else find_product(static, node)
        if isinstance(product, Product):
            at = innermost_module(node) or node.name
            found[product.weight] = f"one of its weights is also used outside of it, at {at}"
    return found


def _free_name(program: Program, region: FeedForward, taken: dict[str, list[FeedForward]]) -> str:
    """The region's name, with a number if another region of the same module has it already."""
    name, number = region.name(program), 1
    weights = set(region.weights)
    while name in taken and set(taken[name][0].weights) != weights:
        number += 1
        name = f"{region.name(program)}.{number}"
    return name


def _layout(layouts: Layouts, region: FeedForward) -> GateLayout | str:
    if region.channels == -1:
        return layouts.of_rows(region.entry, region.exit)
    return layouts.of_map(region.entry, region.entry, channels_last=True)


def _site(
    program: Program, name: str, region: FeedForward, granularity: int, bias_once: bool
) -> FeedForwardSite:
    of = [program.inputs[w.name] for w in region.weights]
    hidden, dims = region.hidden // granularity, _hidden_dims(region)
    parts = tuple(
        Part(i.name, i.kind, ((dims[n], hidden),) if n in dims else ())
        for n, i in enumerate(of)
        if i.kind != "constant" and not (bias_once and n == region.down.bias)
    )
    width = int(value(region.entry).shape[region.channels])
    bias = None if bias_once else region.down.bias
    last = [n for n in (region.down.weight, bias) if n is not None]
    down = tuple(of[n].name for n in last)
    gated, matrices = len(region.ups) > 1, _matrices(program, region)
    macs = width * sum(_widths(region)) + region.hidden * _width(region, region.down)
    return FeedForwardSite(name, parts, width, hidden, macs, gated, down, matrices)


def _hidden_dims(region: FeedForward) -> dict[int, int]:
    """Of the weights with a hidden dimension, by index: which one it is. Empty where hidden units
    are not computed one by one."""
    between = [n for n in region.middle.module.graph.nodes if n.op not in ("placeholder", "output")]
    one_by_one = all(n.op == "call_function" and is_pointwise(n) for n in between)
    if not one_by_one or region.extra or any(w != region.hidden for w in _widths(region)):
        return {}
    dims = {region.down.weight: 0 if region.down.transposed else 1}
    for up in region.ups:
        dims[up.weight] = 1 if up.transposed else 0
        dims |= {} if up.bias is None else {up.bias: 0}
    return dims


def _matrices(program: Program, region: FeedForward) -> tuple[tuple[str, bool], ...]:
    """Weights that only products read, in one orientation, and whether it is (in, out)."""
    read: dict[int, set[bool]] = {}
    for product in (*region.ups, region.down):
        read.setdefault(product.weight, set()).add(product.transposed)
    of = {i: program.inputs[region.weights[i].name] for i in read if i not in region.extra}
    return tuple(
        (given.name, True in read[i]) for i, given in of.items()
        if len(read[i]) == 1 and given.kind == "weight"
    )  # fmt: skip


def _widths(region: FeedForward) -> tuple[int, ...]:
    """Output widths of the products of the region's rows."""
    return tuple(_width(region, up) for up in region.ups)


def _width(region: FeedForward, product: Linear) -> int:
    """The output width of a product."""
    return int(value(region.weights[product.weight]).shape[1 if product.transposed else 0])


@dataclass(frozen=True)
class InsertFeedForward(Pass):
    """Reordered if copies give the dense region's output, since gates sum to one; else approximate.

    as_dense: whether they do.
    by_layer: every region has a router of its own.
    bias_once: the last product's bias is added once, whatever experts a row has.
    shared: whether a region has a shared expert, and of which form; see `FFNExperts`.
    """

    as_dense: bool
    by_layer: bool = False
    bias_once: bool = False
    shared: Literal["plain", "sigmoid"] | None = None
    name = "insert experts"

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        return "reordered" if self.as_dense else "approximate"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        graph, inputs = program.graph, dict(program.inputs)
        sites = sites_to_convert(program, decisions)
        moved: dict[fx.Node, fx.Node] = {}  # exit -> the call that replaces it
        for site, uses in sites.items():
            names = [p.name for p in site.parts] + [site.router] * self.by_layer
            parts = {name: expert_input(program, inputs, site.name, name) for name in names}
            beside = self._shared_inputs(program, inputs, site)
            for number, (region, layout) in enumerate(uses):
                entry = moved.get(region.entry, region.entry)
                if layout is None:
                    layer = f"{site.name}.{number + 1}" if number else site.name
                    gates = _routed(program, region, entry, layer, parts[site.router])
                else:
                    gates = plan_view(program, SortedGates(layout, base=True))
                own = tuple(parts.get(program.inputs[w.name].name) for w in region.weights)
                dims = value(region.exit).ndim
                call = FeedForwardCall(region, _widths(region), dims, self.bias_once)
                with graph.inserting_after(region.exit if layout is not None else gates):
                    given: Any = (entry, gates, tuple(region.weights), own)
                    if self.shared:
                        shared = (beside.get(program.inputs[w.name].name) for w in region.weights)
                        given += ((*shared, beside.get(site.shared_gate)),)
                    routed = graph.call_function(call, given)
                routed.meta = dict(region.exit.meta)
                region.exit.replace_all_uses_with(routed)
                moved[region.exit] = routed
                for node in reversed(region.nodes):
                    if not node.users:
                        graph.erase_node(node)
        return self.done(program, inputs=inputs, sites=tuple(sites), found=None)

    def _shared_inputs(
        self, program: Program, inputs: dict[str, Input], site: FeedForwardSite
    ) -> dict[str, fx.Node]:
        """The shared expert's tensors, by the names of the dense ones, and its gate by its own."""
        if self.shared is None:
            return {}
        parts = {w: site.shared(w) for w in site.weights}
        if self.shared == "sigmoid":
            parts[site.shared_gate] = site.shared_gate
        return {n: expert_input(program, inputs, site.name, part) for n, part in parts.items()}


def _routed(
    program: Program, region: FeedForward, entry: fx.Node, layer: str, rows: fx.Node
) -> fx.Node:
    """The node of the gates that the region's own router makes of its input."""
    view: Any = plan_view(program, LayerGates(layer))
    with program.graph.inserting_after(region.exit):
        given = (view, entry, rows, region.channels)
        logits = program.graph.call_function(layer_logits, given)
    with program.graph.inserting_after(logits):
        return program.graph.call_function(layer_gates, (view, logits))
