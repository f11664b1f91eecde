"""A linear map with LoRA experts that each run on their own rows, given by a plan.

T rows, D input width, O output width, E experts of rank r, K experts a row, S = T * K pairs. This
skips products that a gate of zero would cancel, which pays if E * r is large; for small E * r,
`lora_linear` takes fewer passes. Saved for the backward pass: the inputs, and ``x A^T`` of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..autograd_outputs import changeable, empty_gradients
from ..plan.op import Plan
from . import padded
from .reference import Stack
from .stacked import Needs, low_gradient, up_gradient

__all__ = ["lora_grouped"]


def lora_grouped(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    scales_TK: torch.Tensor,
    plan: Plan,
    a_ErD: Stack,
    b_OEr: Stack,
    rank: int,
) -> torch.Tensor:
    """``y_t = W x_t + bias + sum_k scales[t, k] * B_e A_e x_t`` with e the k-th expert of row t
    (LoRA, arXiv 2106.09685, section 4.1).

    x_TD: any leading dimensions, T rows in total.
    scales_TK: gates times alpha / rank.
    plan: the T * K pairs sorted by expert, from `sort_plan`; a row's experts must differ.
    a_ErD, b_OEr: (E * rank, D) and (O, E * rank), stacks, or lists of parts of whole experts.

    All of one floating-point dtype. Differentiable once; two runs give the same bits. Raises
    ValueError for shapes that do not fit.
    """
    a, b = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (a_ErD, b_OEr))
    ranks = sum(len(t) for t in a)
    if len(plan.offsets) - 1 != ranks // rank or len(plan.order) != scales_TK.numel():
        raise ValueError(
            f"a plan of {len(plan.order)} pairs among {len(plan.offsets) - 1} experts: expected "
            f"{scales_TK.numel()} among {ranks // rank}, for scales {tuple(scales_TK.shape)} and A "
            f"of {ranks} rows at rank {rank}"
        )
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_TD, weight_OD, bias_O, scales_TK, *a, *b)
    )
    given = (x_TD, weight_OD, bias_O, scales_TK, plan.order, plan.offsets, a, b, rank, save)
    if not save and not torch.compiler.is_compiling():
        return _forward(*given)[0]
    return _grouped(*given)[0]


def _groups(
    offsets: torch.Tensor, a: Sequence[torch.Tensor], rank: int
) -> list[tuple[int, slice, int, int]]:
    """(index of the part of A, rows of that part, first pair, end) of each expert with rows."""
    bounds, found, expert = offsets.tolist(), [], 0
    for part, stack in enumerate(a):
        for first in range(0, len(stack), rank):
            lo, hi = bounds[expert], bounds[expert + 1]
            if hi > lo:
                found.append((part, slice(first, first + rank), lo, hi))
            expert += 1
    return found


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor,
    order: torch.Tensor, offsets: torch.Tensor, a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor], rank: int, save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y (T, O), low (S, r) in the plan's order); low has no rows if it is not saved."""
    y, flat = F.linear(x, weight, bias), x.reshape(-1, x.shape[-1])
    rows, gates = order // scales.shape[-1], scales.reshape(-1, 1).index_select(0, order)
    low = x.new_zeros(len(order) if save else 0, rank)
    into = y.view(-1, y.shape[-1])
    if len(a) == 1 and padded.fits(offsets):
        pairs, own = padded.add_padded(into, flat, rows, gates, offsets, a[0], b[0], rank)
        if save:
            low[pairs] = own
        return y, low
    for part, of, lo, hi in _groups(offsets, a, rank):
        mine = rows[lo:hi]
        own = torch.mm(flat.index_select(0, mine), a[part][of].t())
        if save:
            low[lo:hi] = own
        into.index_add_(0, mine, torch.mm(own * gates[lo:hi], b[part][:, of].t()))
    return y, low


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    order: torch.Tensor, offsets: torch.Tensor, low: torch.Tensor, a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor], rank: int, needs: Needs,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients in `needs`, in its order."""
    dy_TO, x_TD = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    rows, gates = order // scales.shape[-1], scales.reshape(-1, 1).index_select(0, order)
    dx = torch.mm(dy_TO, weight) if needs.x else None
    dscales = scales.new_zeros(scales.numel()) if needs.scales else None
    da = [torch.zeros_like(t) if need else None for t, need in zip(a, needs.a, strict=True)]
    db = [torch.zeros_like(t) if need else None for t, need in zip(b, needs.b, strict=True)]
    for part, of, lo, hi in _groups(offsets, a, rank):
        into_a, into_b, mine = da[part], db[part], rows[lo:hi]
        if dx is None and dscales is None and into_a is None and into_b is None:
            continue
        grad = dy_TO.index_select(0, mine)
        dlow = low_gradient(grad, b[part][:, of])
        if dscales is not None:
            dscales[order[lo:hi]] = (dlow * low[lo:hi]).sum(-1)
        dlow *= gates[lo:hi]
        if into_a is not None:
            into_a[of] = torch.mm(dlow.t(), x_TD.index_select(0, mine))
        if into_b is not None:
            into_b[:, of] = up_gradient(grad, low[lo:hi] * gates[lo:hi])
        if dx is not None:
            dx.index_add_(0, mine, torch.mm(dlow, a[part][of]))
    made = [None if dx is None else dx.view(x.shape)]
    made.append(torch.mm(dy_TO.t(), x_TD) if needs.weight else None)
    made.append(dy_TO.sum(0) if needs.bias else None)
    made.append(None if dscales is None else dscales.view(scales.shape))
    return [g for g in (*made, *da, *db) if g is not None]


@torch.library.custom_op("moe_rewrite::lora_grouped", mutates_args=())
def _grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    rank: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, low = _forward(x, weight, bias, scales, order, offsets, a, b, rank, save)
    return changeable(y), low


@_grouped.register_fake
def _(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, _, _, order, _, _, _, rank, save = given
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(order.shape[0] if save else 0, rank)


@torch.library.custom_op("moe_rewrite::lora_grouped_backward", mutates_args=())
def _grouped_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    low: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    rank: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    x_, weight_, bias_, scales_, *parts = needs
    wanted = Needs(x_, weight_, bias_, scales_, parts[: len(a)], parts[len(a) :])
    return _gradients(dy, x, weight, scales, order, offsets, low, a, b, rank, wanted)


@_grouped_backward.register_fake
def _(*given: Any) -> list[torch.Tensor]:
    dy, x, weight, scales, _, _, _, a, b, _, needs = given
    return empty_gradients([x, weight, dy.new_empty(weight.shape[:1]), scales, *a, *b], needs)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, scales, order, offsets, a, b, ctx.rank, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.parts = len(a)
    ctx.save_for_backward(x, weight, scales, order, offsets, output[1], *a, *b)


def _backward(ctx: Any, dy: torch.Tensor, _: Any) -> Any:
    fixed, parts = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    n, wanted = ctx.parts, ctx.needs_input_grad
    lists = [list(need) if isinstance(need, (list, tuple)) else [need] * n for need in wanted[6:8]]
    needs = [*wanted[:4], *lists[0], *lists[1]]
    run = torch.ops.moe_rewrite.lora_grouped_backward
    made = iter(run(dy, *fixed, parts[:n], parts[n:], ctx.rank, needs))
    first = [next(made) if need else None for need in needs[:4]]
    da, db = ([next(made) if need else None for need in of] for of in lists)
    return *first, None, None, da, db, None, None


_grouped.register_autograd(_backward, setup_context=_save)
