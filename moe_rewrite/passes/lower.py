"""Replace reference operations by fused ones, where a site allows it, and say how each is computed.

The cost model chooses among forms while a model runs, since it is about rows and experts at hand;
what is said here is what it chooses for a few numbers of rows and the experts of the conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..analysis.linear_ops import Product, find_product
from ..config import RouterSpec, TokenRouter
from ..experts.ffn.call import FeedForwardCall
from ..experts.lora.call import LoRACall
from ..ir.aten import value
from ..ir.program import Program
from ..ir.sites import FeedForwardSite, RegionSite, Site
from ..kernels import cost_model as costs
from ..kernels.cost_model import CPU, FormName
from ..kernels.lora.op import unchecked as lora_linear
from ..kernels.lora.reference import add_lora_experts
from ..routing.plan import align

ROWS = (1, 64, 512, 4096)


@dataclass(frozen=True)
class Lower:
    """form: the one to take where it fits, None for the cheaper. router, num_experts: of the
    conversion.

    Exact for LoRA experts while their B is zero; a fused feed-forward adds up in another order.
    """

    form: FormName | None
    router: RouterSpec
    num_experts: int

    def __call__(self, program: Program) -> Program:
        by_name = {s.name: s for s in program.sites}
        lowered: dict[str, str] = {}
        for node in list(program.graph.nodes):
            if isinstance(node.target, FeedForwardCall):
                node.target = node.target.lowered(self.form)
                site: Any = by_name[_site_name(program, node.args[3])]
                lowered[site.name] = self._feed_forward(site, node.target)
            elif node.target is add_lora_experts:
                site = by_name[_site_name(program, node.args[3:4])]
                lowered[site.name] = self._fuse_lora(program, node, site)
        for site in program.sites:
            if isinstance(site, Site):
                lowered.setdefault(site.name, "stacked behind its convolution")
            elif isinstance(site, RegionSite):
                lowered[site.name] = "equal groups, the patches of an expert in one batch"
        reordered = any(isinstance(s, FeedForwardSite) for s in program.sites)
        return program.after(
            "lower", "reordered" if reordered else "exact", lowered=tuple(lowered.items())
        )

    @property
    def _few(self) -> int | None:
        """Experts that a row goes to, where that is fewer than all."""
        return self.router.top_k if isinstance(self.router, TokenRouter) else None

    def _fuse_lora(self, program: Program, node: fx.Node, site: Site) -> str:
        """One op for a product and the experts behind it, where nothing else reads the product."""
        out: Any
        rows: Any
        scales: Any
        out, rows, scales, *factors = node.args
        product = find_product(program, out)
        if not isinstance(product, Product) or product.rows is not rows:
            return "stacked, beside a product in a form of its own"
        if set(out.users) != {node}:
            return "stacked, beside a product that others read"
        graph = program.graph
        with graph.inserting_before(node):
            weight = product.weight
            if product.transposed:
                weight = graph.call_function(torch.ops.aten.t.default, (weight,))
                weight.meta = {"val": value(product.weight).t()}
            given = (rows, weight, product.bias, scales)
            if self._few is None:
                fused = graph.call_function(lora_linear, (*given, *factors))
            else:
                call = LoRACall(scales.args[1].scale, self.form)
                args: Any = (*given, _row_gates(graph, scales), *factors)
                fused = graph.call_function(call, args)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(out)
        if self._few is None:
            return "one op with its product, experts stacked: every row goes to every expert"
        k, rank = self._few, scales.args[1].rank
        return "one op with its product, " + self._said(
            lambda rows: costs.lora(
                CPU, rows, site.in_features, site.out_features, self.num_experts, rank, k
            )
        )

    def _feed_forward(self, site: FeedForwardSite, call: FeedForwardCall) -> str:
        if call.form is None:
            return "one expert after the other: no fused op computes what is between its products"
        if self._few is None:
            chosen = isinstance(self.router, TokenRouter) and self.router.policy == "expert"
            return f"one op, {'grouped' if chosen else 'dense: every row goes to every expert'}"
        k, products = self._few, 2 + site.gated
        return "one op, " + self._said(
            lambda rows: costs.ffn(
                CPU, rows, site.features, site.hidden, self.num_experts, k, products
            )
        )

    def _said(self, times: Callable[[int], dict[FormName, float]]) -> str:
        if self.form is not None:
            return f"{self.form} as asked"
        if self._few is None or self._few >= self.num_experts:
            return "dense: every row goes to every expert; chosen anew as experts come"
        said = []
        for rows in ROWS:
            of = times(rows)
            form, other = sorted(of, key=lambda form: of[form])
            share = of[form] / of[other]
            said.append(f"{form} for {rows} rows ({share:.2f} of the time of {other})")
        return "; ".join(said).replace(" 1 rows", " 1 row")


def _site_name(program: Program, parts: Any) -> str:
    """Of the site that owns these expert inputs."""
    part = next(p for p in parts if p is not None)
    return program.inputs[part.name].name.rpartition(":")[0]


def _row_gates(graph: fx.Graph, scales: fx.Node) -> fx.Node:
    """The node of each expert's rows that lie as the rows of these scales."""
    plan: Any
    layout: Any
    plan, layout = scales.args
    wanted = replace(layout, rank=1, scale=1.0, sorted="experts")
    for node in plan.users:
        if node.target is align and node.args[1] == wanted:
            return node
    with graph.inserting_after(scales):
        return graph.call_function(align, (plan, wanted))
