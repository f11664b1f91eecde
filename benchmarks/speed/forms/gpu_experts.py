"""The forms of a layer of feed-forward experts on a GPU, for benchmarks.speed.gpu."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import route, sort_plan

from ...tools.device import Place
from ...tools.models import with_backward
from .peers import transformers_experts

Step = Callable[[], torch.Tensor]


class Shape(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    def __str__(self) -> str:
        return f"T{self.tokens} d{self.width} n{self.hidden} E{self.experts} k{self.k}"

    def flops(self) -> float:
        """FLOPs of the three products of a forward pass."""
        return 6.0 * self.tokens * self.k * self.width * self.hidden


class Dense:
    """One square product."""

    def __init__(self, place: Place) -> None:
        self.n = 8192 if place.device == "cuda" else 64
        self.a, self.b = (place.randn(self.n, self.n, grad=False) for _ in range(2))

    def run(self) -> torch.Tensor:
        return self.a @ self.b

    def tflops(self, milliseconds: float) -> float:
        return 2 * self.n**3 / milliseconds / 1e9


class Experts:
    """One shape's inputs and its forms."""

    def __init__(self, shape: Shape, place: Place) -> None:
        torch.manual_seed(0)
        T, D, H, E, K = shape
        self.shape, self.place = shape, place
        self.x, self.direction = place.randn(T, D), place.randn(T, D, grad=False)
        gates, self.chosen = route(torch.randn(T, E, device=place.device), K)
        self.gates = gates.detach().requires_grad_()
        self.plan = sort_plan(self.chosen, E)
        self.up, self.gate = (place.randn(E, H, D, scale=D**-0.5) for _ in range(2))
        self.down = place.randn(E, D, H, scale=H**-0.5)

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.gates, self.up, self.down, self.gate]

    def ours(self) -> torch.Tensor:
        return ffn_experts(
            self.x, self.gates, self.chosen, self.plan, self.up, self.down, self.gate
        )

    def grouped(self) -> torch.Tensor:
        """The plain pipeline: gather, two products in one, activation, product, weighed sum."""
        order, offsets, inverse = self.plan
        ends = offsets[1:].to(torch.int32)
        given = self.x[order // self.shape.k]

        def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(a, w.transpose(1, 2), offs=ends)

        hidden = F.silu(product(given, self.gate)) * product(given, self.up)
        y = product(hidden, self.down)[inverse].view(*self.gates.shape, -1)
        return (y * self.gates.unsqueeze(-1).to(y.dtype)).sum(1)

    def forms(self) -> dict[str, Step]:
        found: dict[str, Step] = {"ours": self.ours}
        for name, make in (
            ("F.grouped_mm", lambda: self.grouped), ("transformers", self._transformers),
            ("ScatterMoE", self._scattermoe), ("Liger", self._liger),
        ):  # fmt: skip
            try:
                run = make()
                if run is not None:
                    far = (run() - self.ours()).norm() / self.ours().norm()
                    if not far < 0.05:
                        raise RuntimeError(f"its result is {far:.3g} off")
                    found[name] = run
            except (ImportError, RuntimeError, TypeError, AttributeError) as error:
                print(f"{self.shape}: {name} left out: {str(error).splitlines()[0]}")
        return found

    def _transformers(self) -> Step | None:
        if find_spec("transformers") is None:
            return None
        peer = transformers_experts(self.shape.k, self.up, self.down, self.gate)
        return lambda: peer(self.x, self.chosen, self.gates.to(self.x.dtype))

    def _scattermoe(self) -> Step | None:
        if find_spec("scattermoe") is None or self.place.device != "cuda":
            return None
        from scattermoe.mlp import GLUMLP

        _, width, hidden, experts, k = self.shape
        peer = GLUMLP(width, hidden, experts, k, activation=torch.nn.SiLU())
        peer = peer.to(self.place.device, self.place.dtype)
        return lambda: peer(self.x, self.gates.to(self.x.dtype), self.chosen)

    def _liger(self) -> Step | None:
        if find_spec("liger_kernel") is None or self.place.device != "cuda":
            return None
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        both = torch.cat([self.gate, self.up], 1).detach().requires_grad_()
        run, chosen = LigerFusedMoEFunction.apply, self.chosen.int()
        return lambda: run(self.x, both, self.down, chosen, self.gates.to(self.x.dtype))

    def measure(self, dense: Dense) -> dict[str, dict[str, float]]:
        """Milliseconds of each form and of the dense product beside it: forward alone, and forward
        with backward."""
        forms = self.forms()
        with torch.no_grad():
            forward = self.place.milliseconds(forms | {"dense": dense.run})
        steps = {n: with_backward(run, self.direction, self.leaves()) for n, run in forms.items()}
        both = self.place.milliseconds(steps | {"dense": dense.run})
        return {n: {"forward": forward[n], "both": both[n]} for n in forward}
