"""Replace feed-forward regions by routed experts that start as copies of them.

Without experts the call runs the dense region. With them it equals that region while they are
copies and a row's gates sum to one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..analysis.feedforward import FeedForward, find_feedforward
from ..analysis.infer_layout import Layouts
from ..config import FFNExperts, RouterSpec
from ..experts.ffn.call import FeedForwardCall
from ..ir.aten import identifier, value
from ..ir.gate_layout import Layout
from ..ir.program import Input, Program
from ..ir.sites import FeedForwardSite, Part, Rejection
from ..routing.plan import align
from .insert_router import router_node
from .split import segments

Use = tuple[FeedForward, Layout]
SORTED = {"sorted": "all"}


def find_feedforward_sites(
    program: Program, experts: FFNExperts, router: RouterSpec
) -> tuple[dict[FeedForwardSite, list[Use]], list[Rejection]]:
    """The regions of the deep segment that can hold experts, and those that cannot with why."""
    _, deep = segments(program)
    layouts = Layouts(program, deep, router, **SORTED)
    uses: dict[str, list[FeedForward]] = {}
    rejected: dict[str, str] = {}
    for found in find_feedforward(program, deep):
        if isinstance(found, FeedForward):
            uses.setdefault(_free_name(program, found, uses), []).append(found)
        else:
            rejected.setdefault(*found)
    sites: dict[FeedForwardSite, list[Use]] = {}
    for number, (name, regions) in enumerate(uses.items()):
        reason = experts.refuses(name, len(uses) - 1 - number)
        laid = [_layout(layouts, region) for region in regions]
        reason = reason or next((x for x in laid if isinstance(x, str)), None)
        if reason is not None:
            rejected[name] = reason
        else:
            site = _site(program, name, regions[0])
            sites[site] = [
                (r, x) for r, x in zip(regions, laid, strict=True) if isinstance(x, Layout)
            ]
    return sites, [Rejection(n, r) for n, r in rejected.items()]


def _free_name(program: Program, region: FeedForward, taken: dict[str, list[FeedForward]]) -> str:
    """The region's name, numbered where others of the same module have it already."""
    name, number = region.name(program), 1
    weights = set(region.weights)
    while name in taken and set(taken[name][0].weights) != weights:
        number += 1
        name = f"{region.name(program)}.{number}"
    return name


def _layout(layouts: Layouts, region: FeedForward) -> Layout | str:
    if region.channels == -1:
        return layouts.of_rows(region.entry)
    return layouts.of_map(region.entry, region.entry, "map_last")


def _site(program: Program, name: str, region: FeedForward) -> FeedForwardSite:
    of = [program.inputs[w.name] for w in region.weights]
    parts = tuple(Part(i.name, i.kind, ()) for i in of if i.kind != "constant")
    width = int(value(region.entry).shape[region.channels])
    return FeedForwardSite(name, parts, width, region.hidden, len(region.ups) > 1)


def _widths(region: FeedForward) -> tuple[int, ...]:
    """Of the products of the region's rows."""
    weights = [(value(region.weights[up.weight]), up) for up in region.ups]
    return tuple(int(w.shape[1 if up.transposed else 0]) for w, up in weights)


def insert_feedforward(
    program: Program, sites: dict[FeedForwardSite, list[Use]], rejected: list[Rejection],
    exact: bool,
) -> Program:  # fmt: skip
    """exact: gates sum to one, so that copies give what the dense region gives."""
    graph, plan = program.graph, router_node(program)
    inputs = dict(program.inputs)
    aligned: dict[Layout, fx.Node] = {}
    first = next(iter(graph.nodes))
    moved: dict[fx.Node, fx.Node] = {}  # exit -> the call in its place
    for site, uses in sites.items():
        parts: dict[str, fx.Node] = {}
        for part in site.parts:
            with graph.inserting_before(first):
                node = graph.placeholder("expert_" + identifier(part.name))
            inputs[node.name] = Input("expert", f"{site.name}:{part.name}")
            parts[part.name] = node
        for region, layout in uses:
            if layout not in aligned:
                with graph.inserting_after(plan):
                    arguments: Any = (plan, layout)
                    aligned[layout] = graph.call_function(align, arguments)
            own = tuple(parts.get(program.inputs[w.name].name) for w in region.weights)
            call = FeedForwardCall(region, _widths(region), value(region.exit).ndim)
            with graph.inserting_after(region.exit):
                entry = moved.get(region.entry, region.entry)
                args: Any = (entry, aligned[layout], tuple(region.weights), own)
                routed = graph.call_function(call, args)
            routed.meta = dict(region.exit.meta)
            region.exit.replace_all_uses_with(routed)
            moved[region.exit] = routed
            for node in reversed(region.nodes):
                if not node.users:
                    graph.erase_node(node)
    return program.after(
        "insert_feedforward", "reordered" if exact else "approximate",
        inputs=inputs, sites=tuple(sites), rejected=tuple(rejected),
    )  # fmt: skip
