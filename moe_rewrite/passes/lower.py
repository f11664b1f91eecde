"""Replace reference operations by fused ones, where a site allows it, and report how each site is
computed.

The cost model chooses among forms while a model runs, since costs depend on a call's rows and on
the active experts; the report shows its choice for a few numbers of rows and the experts of the
conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.linear_ops import Product, find_product
from ..analysis.static_values import Static, static_values
from ..config import RouterSpec
from ..experts.ffn.call import FeedForwardCall
from ..experts.lora.call import LoRACall
from ..experts.lora.grouped_call import GroupedLoRACall, SortedLoRACall
from ..ir.aten import value
from ..ir.ops import op
from ..ir.program import Program
from ..ir.sites import FeedForwardSite, LoRASite
from ..kernels import cost_model
from ..kernels.cost_model import CPU, Execution
from ..kernels.lora.op import lora_linear_unchecked
from ..kernels.lora.reference import add_lora_experts
from ..routing.plan_views import SortedGates
from .base import Decisions, Pass
from .wiring import plan_view

ROWS = (1, 64, 512, 4096)
ONE_BY_ONE = "one expert after the other: no fused op has the operations between its products"
Seconds = Callable[[int], dict[Execution, float]]  # of a number of rows


@dataclass(frozen=True)
class Choice:
    """How to choose between dense and grouped execution.

    requested: the execution to use where it fits; None for the cheaper one.
    router: of the conversion.
    num_experts: experts to begin with.
    """

    requested: Execution | None
    router: RouterSpec
    num_experts: int

    @property
    def few(self) -> int | None:
        """Experts that a row goes to at most; None: all."""
        return self.router.top_k

    def describe(self, times: Seconds) -> str:
        """Text for the report: what is chosen."""
        if self.requested is not None:
            return f"{self.requested} as asked"
        if self.few is None or self.few >= self.num_experts:
            return "dense: every row goes to every expert; chosen anew as experts come"
        said = []
        for rows in ROWS:
            of = times(rows)
            best, other = sorted(of, key=lambda execution: of[execution])
            share = of[best] / of[other]
            said.append(f"{best} for {rows} rows ({share:.2f} of the time of {other})")
        return "; ".join(said).replace(" 1 rows", " 1 row")


@dataclass(frozen=True)
class LowerLoRA(Pass):
    """Exact while the experts' B is zero."""

    choice: Choice
    name = "lower"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        lowered, static = {}, static_values(program)
        for node in list(program.graph.find_nodes(op="call_function", target=add_lora_experts)):
            _, _, _, *factors = node.args
            site = _site(program, factors)
            lowered[site.name] = self._fuse(program, static, node, site)
        for site in program.sites:
            if getattr(site, "kernel", ()):
                lowered[site.name] = "stacked after its convolution"
            elif getattr(site, "groups", 0):
                lowered[site.name] = "stacked, sorted as the rows of the model's own experts"
        for node in list(program.graph.nodes):
            if isinstance(node.target, GroupedLoRACall):
                self._fuse_sorted(program, node, node.target)
        return self.done(program, lowered=tuple(lowered.items()))

    def _fuse_sorted(self, program: Program, node: fx.Node, call: GroupedLoRACall) -> None:
        """Fuse a product with a model's own experts and the experts after it, if nothing else reads
        the product."""
        given: Any = node.args
        out, rows, *rest = given
        read, weight, *others = out.args
        if set(out.users) != {node} or read is not rows or len(others) != 1:
            return
        with program.graph.inserting_before(node):
            fused: Any = SortedLoRACall(call.product)
            fused = program.graph.call_function(fused, (rows, weight, *rest))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        program.graph.erase_node(node)
        program.graph.erase_node(out)

    def _fuse(self, program: Program, static: Static, node: fx.Node, site: LoRASite) -> str:
        """Fuse a product with the experts after it if nothing else reads the product; returns the
        text for the report."""
        given: Any = node.args
        out, rows, scales, *factors = given
        product = find_product(static, out)
        own = op(out).product == "other"  # an einsum, which may add in another order
        if not isinstance(product, Product) or product.rows is not rows or own:
            return "stacked, beside a product in a form of its own"
        if program.quantized(product.weight):
            return "stacked, beside a product with a quantised weight"
        if set(out.users) != {node}:
            return "stacked, beside a product that others read"
        graph, few = program.graph, self.choice.few
        _, view = scales.args
        with graph.inserting_before(node):
            weight = product.weight
            if product.transposed:
                weight = graph.call_function(torch.ops.aten.t.default, (weight,))
                weight.meta = {"val": value(product.weight).t()}
            dense = (rows, weight, product.bias, scales)
            if few is None:
                fused = graph.call_function(lora_linear_unchecked, (*dense, *factors))
            else:
                apart = plan_view(program, SortedGates(view.layout, base=False))
                call: Any = LoRACall(view.scale, self.choice.requested)
                fused = graph.call_function(call, (*dense, apart, *factors))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(out)
        if few is None:
            return "one op with its product, experts stacked: every row goes to every expert"
        sizes = site.in_features, site.out_features, self.choice.num_experts, view.rank, few
        return "one op with its product, " + self.choice.describe(
            lambda rows: cost_model.lora(CPU, rows, *sizes)
        )


@dataclass(frozen=True)
class LowerFeedForward(Pass):
    """Reordered: a fused feed-forward adds in another order."""

    choice: Choice
    name = "lower"
    numerics = "reordered"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        lowered = {}
        for node, call in _feed_forwards(program.graph):
            _, _, _, experts, *_ = node.args
            site = _site(program, experts)
            fused = call.lowered(self.choice.requested)
            node.target = fused  # type: ignore[assignment]
            lowered[site.name] = self.describe(site) if fused.form else ONE_BY_ONE
        return self.done(program, lowered=tuple(lowered.items()))

    def describe(self, site: FeedForwardSite) -> str:
        """Text for the report: how a region with a fused op is computed."""
        few, router = self.choice.few, self.choice.router
        if few is None:
            grouped = router.policy == "expert"
            return f"one op, {'grouped' if grouped else 'dense: every row goes to every expert'}"
        sizes = site.features, site.hidden, self.choice.num_experts, few, 2 + site.gated
        return "one op, " + self.choice.describe(lambda rows: cost_model.ffn(CPU, rows, *sizes))


def _feed_forwards(graph: fx.Graph) -> Iterator[tuple[fx.Node, FeedForwardCall]]:
    for node in list(graph.nodes):
        if isinstance(node.target, FeedForwardCall):
            yield node, node.target


def _site(program: Program, parts: Any) -> Any:
    """The site that owns these expert inputs."""
    part = next(p for p in parts if p is not None)
    name = program.inputs[part.name].name.rpartition(":")[0]
    return next(site for site in program.sites if site.name == name)
