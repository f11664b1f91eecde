"""Routed feed-forwards whose experts' matrices are in int8 or bfloat16 (`kernels/ffn/low_precision`).

T rows, E experts, S pairs of a row and one of its experts in the plan's order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...errors import ConfigError
from ...kernels.ffn.cpu_plan import combine
from ...kernels.ffn.low_precision import LowPrecision, grouped_linear
from ...routing.dispatch import Dispatch

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TRAIN = (
    "keep a save from before quantize_experts(), load it with moe_rewrite.load(folder, model), train "
    "that and quantise it again"
)


def holds_low_precision(weights: list[list[Any]]) -> bool:
    return any(type(tensor) is LowPrecision for tensor in weights[-1])


def run_sorted(
    body: Any, matrix: Callable[[Any, list[Any]], Any], x_TD: torch.Tensor,
    gates_TE: torch.Tensor, dispatch: Dispatch, weights: list[list[Any]],
) -> torch.Tensor:  # fmt: skip
    """(T, D) output of each row's experts, on the CPU and outside of compiled code: the values
    between two products are rounded once for all experts."""
    plan, bounds = dispatch.plan, dispatch.plan.offsets.tolist()
    counts = [hi - lo for lo, hi in pairwise(bounds)]
    weights = [w for w, n in zip(weights, counts, strict=True) if n]
    kept, sizes = plan.order[: bounds[-1]], [n for n in counts if n]
    if not sizes:
        return torch.zeros_like(x_TD)

    def through(x_SD: torch.Tensor, product: Any) -> torch.Tensor:
        biases = None if product.bias is None else [w[product.bias] for w in weights]
        return grouped_linear(x_SD, [matrix(product, w) for w in weights], biases, sizes)

    rows = x_TD.index_select(0, kept // dispatch.experts_TK.shape[1])
    hidden = [through(rows, product) for product in body.ups]
    y_SD = through(_middle(body, hidden, weights, sizes), body.down)
    y_SD = F.pad(y_SD, (0, 0, 0, len(plan.order) - len(kept)))  # pairs without an expert
    gates_TK = gates_TE.gather(1, dispatch.experts_TK.clamp_min(0))
    return combine(y_SD, plan.inverse.view(gates_TK.shape), gates_TK)


def _middle(
    body: Any, hidden: list[torch.Tensor], weights: list[list[Any]], sizes: list[int]
) -> torch.Tensor:
    """What lies between the products; expert by expert only where it has weights of its own."""
    if not body.extra:
        return body.middle.call(*hidden)
    parts = zip(*(h.split_with_sizes(sizes) for h in hidden), strict=True)
    made = [
        body.middle.call(*own, *(w[i] for i in body.extra))
        for own, w in zip(parts, weights, strict=True)
    ]
    return torch.cat(made)


def without_gradient(run: Run, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> torch.Tensor:
    """The result of `run`; a backward pass through it raises ConfigError instead of giving none."""
    if torch.is_grad_enabled() and (x_TD.requires_grad or gates_TE.requires_grad):
        return _Refused.apply(x_TD, gates_TE, run)
    return run(x_TD, gates_TE)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gates: torch.Tensor, run: Run) -> torch.Tensor:
        return run(x, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        raise ConfigError(f"a gradient through quantised experts: they are for inference; {TRAIN}")
