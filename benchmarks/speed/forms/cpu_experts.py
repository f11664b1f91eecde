"""The forms of a layer of feed-forward experts on the CPU, for benchmarks.speed.cpu."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

import moe_rewrite
from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import route, sort_plan

from ...tools.models import with_backward
from ...tools.timing import Times, side_by_side
from .peers import transformers_experts

WIDTH = 512
CACHE = 64 << 20  # bytes read before each call, as other layers' weights are in a model


class Cell:
    """One size at one number of rows: the forms, each a call without arguments, and what their
    backward passes reach."""

    def __init__(self, rows: int, experts: int, k: int, hidden: int) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, WIDTH, requires_grad=True)
        self.gates, self.experts = route(torch.randn(rows, experts), k)
        self.gates.requires_grad_()
        self.plan = sort_plan(self.experts, experts)

        def weight(*size: int) -> torch.Tensor:
            return (torch.randn(size) / size[-1] ** 0.5).requires_grad_()

        wide = k * hidden
        self.dense = [weight(wide, WIDTH), weight(WIDTH, wide), weight(wide, WIDTH)]
        self.stacks = [
            weight(experts, hidden, WIDTH), weight(experts, WIDTH, hidden),
            weight(experts, hidden, WIDTH),
        ]  # fmt: skip
        self.apart = [[w.detach().clone().requires_grad_() for w in s] for s in self.stacks]
        self.peer = transformers_experts(k, *self.stacks)
        self.leaves = [self.x, self.gates, *self.dense, *self.stacks, *self.peer.parameters()]
        self.leaves += [w for kind in self.apart for w in kind]
        self.direction = torch.randn(rows, WIDTH)
        self.others = torch.ones(CACHE // 4)

    def forms(self) -> dict[str, Callable[[], torch.Tensor]]:
        def dense() -> torch.Tensor:
            up, down, gate = self.dense
            return F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down)

        def ours(weights: Any) -> Callable[[], torch.Tensor]:
            return lambda: ffn_experts(self.x, self.gates, self.experts, self.plan, *weights)

        def peer(form: str) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                self.peer.config._experts_implementation = form
                return self.peer(self.x, self.experts, self.gates)

            return run

        return {
            "dense": dense, "stacked": ours(self.stacks), "apart": ours(self.apart),
            "eager": peer("eager"), "grouped_mm": peer("grouped_mm"),
            "registered": peer(moe_rewrite.register_experts()),
        }  # fmt: skip

    def products(self, backward: bool) -> Callable[[], None]:
        """Only the experts' products, on sorted rows and into allocated memory: a lower bound."""
        up, down, gate = (w.detach() for w in self.stacks)
        grads = [torch.empty_like(w) for w in (up, down, gate)]
        ends = self.plan.offsets.tolist()
        sizes = [hi - lo for lo, hi in pairwise(ends)]
        rows, hidden = torch.randn(2, max(sizes), WIDTH), torch.randn(3, max(sizes), up.shape[1])

        def run() -> None:
            for e, n in enumerate(sizes):
                (x, y), (a, b, c) = rows[:, :n], hidden[:, :n]
                torch.mm(x, up[e].t(), out=a)
                torch.mm(x, gate[e].t(), out=b)
                torch.mm(c, down[e].t(), out=y)
            for e, n in enumerate(sizes if backward else ()):
                (x, y), (a, b, c) = rows[:, :n], hidden[:, :n]
                torch.mm(x, down[e], out=c)
                torch.mm(x.t(), a, out=grads[1][e])
                torch.mm(a.t(), x, out=grads[0][e])
                torch.mm(b.t(), x, out=grads[2][e])
                torch.mm(a, up[e], out=y).addmm_(b, gate[e])

        return run

    @torch.no_grad()
    def check(self) -> None:
        """All routed forms agree."""
        found = {name: run() for name, run in self.forms().items() if name != "dense"}
        for name, y in found.items():
            torch.testing.assert_close(y, found["stacked"], msg=name, rtol=1e-3, atol=1e-4)

    def measure(self, seconds: float, rounds: int, backward: bool) -> Times:
        """Time the forms, with caches cold. A form that takes over half of the seconds in two calls
        is not competitive and drops out."""
        forms: dict[str, Callable[[], Any]] = dict(self.forms())
        if backward:
            forms = {name: with_backward(run, self.direction) for name, run in forms.items()}
        with torch.set_grad_enabled(backward):
            return side_by_side(
                forms | {"products": self.products(backward)}, rounds, warm=1, seconds=seconds,
                before=lambda _: self._cold(), drop_above=250 * seconds,
            )  # fmt: skip

    def _cold(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.others.sum()
