"""Feed-forward experts in a trace: one placeholder a site, which is lowered afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...experts.ffn.call import FeedForwardCall, Weights
from ...ir.program import Code
from ...ir.structural_key import structural_key
from ...routing.dispatch import RowGates

DOMAIN, OPERATOR = "moe_rewrite", "FeedForwardExperts"


@dataclass(frozen=True)
class Routing:
    """How rows are routed at a site.

    experts: how many a trace has, with the frozen region if `base`.
    top_k: experts of a row at most; None: no limit.
    base: the frozen region counts as expert 0.
    """

    experts: int
    top_k: int | None
    base: bool


class TracedFeedForward(FeedForwardCall):
    """A region's call that becomes a placeholder (x, gates, weights of expert 0, of 1, ...) in a
    trace, and is computed as usual elsewhere."""

    routing: Routing | None = None  # of the last call
    open: tuple[bool, ...] = ()  # in the last call, which of the region's tensors were stacks

    def __init__(self, call: FeedForwardCall, number: int, name: str) -> None:
        self.__dict__.update(call.__dict__)
        self.number, self.name = number, name

    @property
    def trace_key(self) -> Any:
        """Equal for calls whose traces differ only in the placeholder's number. The dense region is
        in a trace where no expert is on, and as the form of a shared expert."""
        of = self.dense
        form = structural_key(of.middle.module.graph), of.ups, of.down, of.extra
        return TracedFeedForward, self.channels, self.dims, form

    def by_expert(self, base: bool, dense: tuple, experts: tuple) -> list[Weights]:
        """In a trace, experts in stacks count as a single one, so their number stays dynamic."""
        self.open = tuple(isinstance(own, torch.Tensor) for own in experts)
        if any(self.open) and torch.compiler.is_exporting():
            stacks = [d if own is None else own for d, own in zip(dense, experts, strict=True)]
            return [list(dense), stacks] if base else [stacks]
        lists = tuple(own if own is None else list(own) for own in experts)
        return super().by_expert(base, dense, lists)

    def run(
        self, x_TD: torch.Tensor, gates: RowGates, lead: tuple[int, ...], weights: list[Weights]
    ) -> torch.Tensor:
        taken = 1 + gates.base if any(self.open) else len(weights)
        self.routing = Routing(taken, gates.top_k, gates.base)
        if not torch.compiler.is_exporting():
            return super().run(x_TD, gates, lead, weights)
        gates_TE = gates.gates.expand(*lead, -1).reshape(-1, gates.gates.shape[-1]).to(x_TD.dtype)
        inputs = [x_TD, gates_TE, *(w for own in weights for w in own)]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", inputs, {"number": self.number}, dtype=x_TD.dtype,
            shape=x_TD.shape, version=1,
        )  # fmt: skip


def with_placeholders(
    code: Code, owned: tuple[tuple[str, str], ...], calls: list[TracedFeedForward]
) -> Code:
    """The same code with a TracedFeedForward instead of every region's call, appended to `calls`.

    owned: (kind, name) of the code's first arguments, which tell a region's site.
    """
    if not any(isinstance(n.target, FeedForwardCall) for n in code.module.graph.nodes):
        return code
    graph = fx.Graph()
    graph.output(graph.graph_copy(code.module.graph, {}))
    sites = [name.partition(":")[0] if kind == "expert" else "" for kind, name in owned]
    site_of = dict(zip(graph.find_nodes(op="placeholder"), sites, strict=False))
    for node in graph.nodes:
        if isinstance(node.target, FeedForwardCall):
            name = next(site_of[n] for n in node.all_input_nodes if site_of.get(n))
            calls.append(TracedFeedForward(node.target, len(calls), name))
            node.target = calls[-1]
    return Code(fx.GraphModule(code.module, graph))
