"""Routes and plans, without a host synchronisation: `largest`, `route`, `sort_plan`.

T rows, E experts, K experts a row. Every selection follows the rule of `largest`: models, kernels
and exported files choose the same experts and patches on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from ..triton import runs_on
from . import reference
from .reference import Plan

__all__ = ["Plan", "dense_plan", "largest", "route", "sort_plan"]

KEYS = 2**16  # most positions that a 64-bit key can hold beside a 32-bit score


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(..., k) int64: indices of the k largest values of the last dimension, in falling order; of
    equal values, the lower index comes first.

    A trace for export has one TopK instead, for which ONNX specifies the same order.
    """
    if torch.compiler.is_exporting():
        return scores.topk(k, dim=-1).indices
    size = scores.shape[-1]
    if scores.dtype == torch.float64 or k == size or size > KEYS:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    # the top k of keys that are all different
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: no negative zero
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    place = torch.arange(size - 1, -1, -1, device=scores.device)
    return size - 1 - (rising * KEYS + place).topk(k, dim=-1).values % KEYS


def route(
    logits_TE: torch.Tensor, k: int, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates_TK fp32, experts_TK int64): softmax over all experts in fp32, then the k largest.

    logits_TE: any leading dimensions, fp64 / fp32 / bf16 / fp16 (fp64 gives fp64 gates).
    normalize: divide the gates by their sum.

    Gates are in falling order; of equal logits, the lower index comes first. Differentiable once
    with respect to the logits. Raises ValueError for a k outside 1 .. E or an integer dtype.
    """
    if torch.compiler.is_exporting() and normalize:  # TopK returns the values too
        values, chosen = logits_TE.topk(k, dim=-1)
        return _wide(values).softmax(-1), chosen
    if torch.compiler.is_exporting():
        return _softmax_of(logits_TE, largest(logits_TE, k), normalize)
    if not logits_TE.is_floating_point():
        raise ValueError(f"logits have dtype {logits_TE.dtype}: expected a floating-point dtype")
    experts = logits_TE.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k}: expected 1 .. {experts}, the number of experts in the logits")
    save = torch.is_grad_enabled() and logits_TE.requires_grad
    run: Any = _route if save or torch.compiler.is_compiling() else _plain_route
    gates, chosen = run(logits_TE.reshape(-1, experts), k, normalize)
    shape = (*logits_TE.shape[:-1], k)
    return gates.view(shape), chosen.view(shape)


def sort_plan(experts_TK: torch.Tensor, num_experts: int) -> Plan:
    """The (row, choice) pairs sorted by expert: a stable counting sort.

    experts_TK: int64, any leading dimensions; an index outside 0 .. num_experts-1 drops its pair,
        which comes after all others in the order.

    Nothing is read back to the host, so a CUDA graph can capture it. Raises ValueError for another
    dtype, or for num_experts < 1.
    """
    if experts_TK.dtype != torch.int64:
        raise ValueError(f"experts have dtype {experts_TK.dtype}: expected torch.int64")
    if num_experts < 1:
        raise ValueError(f"num_experts = {num_experts}: expected at least 1")
    return Plan(*_sort_plan(experts_TK.reshape(-1), num_experts))


def dense_plan(rows: int, num_experts: int, device: torch.device | str | None = None) -> Plan:
    """The plan in which every row takes every expert, with expert e as choice e: no sort."""
    pairs = torch.arange(rows * num_experts, device=device)
    order = pairs.view(rows, num_experts).t().reshape(-1)
    inverse = pairs.view(num_experts, rows).t().reshape(-1)
    return Plan(order, torch.arange(num_experts + 1, device=device) * rows, inverse)


def _plain_route(
    logits: torch.Tensor, k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_on(logits):
        from . import launch

        return launch.route(logits, k, normalize)
    return _softmax_of(logits, largest(logits, k), normalize)


def _softmax_of(
    logits: torch.Tensor, experts: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(logits)
    if normalize:
        return wide.gather(-1, experts).softmax(-1), experts
    return wide.softmax(-1).gather(-1, experts), experts


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# for one token the op's dispatch takes noticeable time, so `route` bypasses it if it can
_route = torch.library.custom_op("moe_rewrite::route", _plain_route, mutates_args=())


@_route.register_fake
def _(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.shape[0], k
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("moe_rewrite::route_backward", mutates_args=())
def _route_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    if runs_on(logits):
        from . import launch

        return launch.route_backward(grad, logits, gates, experts, normalize)
    weighed = grad * gates
    total = weighed.sum(-1, keepdim=True)
    if normalize:
        chosen = weighed - gates * total
        return torch.zeros_like(logits, dtype=grad.dtype).scatter_(-1, experts, chosen).to(logits)
    wide = logits.to(grad.dtype).softmax(-1).mul_(-total)
    return wide.scatter_add_(-1, experts, weighed).to(logits)  # a row's experts differ: no race


@_route_backward.register_fake
def _(
    grad: torch.Tensor,
    logits: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    return torch.empty_like(logits)


def _save_route(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, *output)


def _backward_route(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    logits, gates, experts = ctx.saved_tensors
    back = torch.ops.moe_rewrite.route_backward
    return back(grad, logits, gates, experts, ctx.normalize), None, None


_route.register_autograd(_backward_route, setup_context=_save_route)


@torch.library.custom_op("moe_rewrite::sort_plan", mutates_args=())
def _sort_plan(
    experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_on(experts):
        from . import launch

        return launch.sort_plan(experts, num_experts)
    return tuple(reference.sort_plan(experts, num_experts))  # type: ignore[return-value]


@_sort_plan.register_fake
def _(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = experts.new_empty(num_experts + 1)
    return torch.empty_like(experts), offsets, torch.empty_like(experts)
