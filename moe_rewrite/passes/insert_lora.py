"""Insert LoRA experts: behind each site's product, add the gated low-rank delta.

Exact while the experts' B is zero. The base product is not touched, in whatever form it is.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.aten import identifier
from ..ir.gate_layout import Layout
from ..ir.program import Input, Program
from ..ir.sites import Rejection, Site
from ..kernels.lora.reference import add_conv_lora_experts, add_lora_experts
from ..routing.plan import align
from .find_lora_sites import Match
from .insert_router import router_node


def insert_experts(
    program: Program, sites: dict[Site, list[Match]], rejected: list[Rejection]
) -> Program:
    graph, plan = program.graph, router_node(program)
    inputs = dict(program.inputs)
    layouts = list(dict.fromkeys(m.layout for uses in sites.values() for m in uses))
    aligned: dict[Layout, fx.Node] = {}
    for layout in reversed(layouts):
        with graph.inserting_after(plan):
            arguments: Any = (plan, layout)
            aligned[layout] = graph.call_function(align, arguments)
    first = next(iter(graph.nodes))
    added: dict[fx.Node, fx.Node] = {}  # product -> the same with its experts
    for site, uses in sites.items():
        parts = []
        for part in ("a", "b"):
            with graph.inserting_before(first):
                node = graph.placeholder(f"expert_{part}_{identifier(site.name)}")
            inputs[node.name] = Input("expert", f"{site.name}:{part}")
            parts.append(node)
        for use in uses:
            with graph.inserting_after(use.node):
                rows = added.get(use.rows, use.rows)  # a site may read another's product itself
                args = (use.node, rows, aligned[use.layout], *parts, *use.options)
                add = add_conv_lora_experts if site.kernel else add_lora_experts
                routed = graph.call_function(add, args)
            routed.meta = dict(use.node.meta)
            use.node.replace_all_uses_with(routed)
            routed.args = args  # it reads the product itself
            added[use.node] = routed
    return program.after(
        "insert_experts", "exact", inputs=inputs, sites=tuple(sites), rejected=tuple(rejected)
    )
