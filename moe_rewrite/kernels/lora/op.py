"""A linear map with LoRA experts as one op; rows keep their order.

T rows (any leading dimensions), D input width, O output width, R ranks of all experts together.
Saved for the backward pass: the inputs and ``x A^T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..autocast import autocasts
from ..autograd_outputs import changeable, empty_gradients
from . import reference
from .reference import Stack
from .stacked import Needs, backward, forward, product

__all__ = ["lora_linear"]


def lora_linear(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    scales_TR: torch.Tensor,
    a_RD: Stack,
    b_OR: Stack,
) -> torch.Tensor:
    """``x W^T + bias + ((x A^T) * scales) B^T`` (LoRA, arXiv 2106.09685, section 4.1, summed over
    experts by their gates).

    scales_TR: each expert's gate times alpha / rank, repeated over its rank; its leading dimensions
        broadcast to those of x.
    weight_OD: may be a transposed view.
    a_RD, b_OR: stacks, or lists of parts of any rank (one tensor an expert, or the older experts'
        stack and the newest expert). Only parts that require a gradient get one.

    All of one dtype (fp32, bf16, fp16, fp64). Differentiable once. In a trace for export these are
    plain products. Raises ValueError for shapes or dtypes that do not fit.
    """
    a, b = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (a_RD, b_OR))
    _check(x_TD, weight_OD, bias_O, scales_TR, a, b)
    return lora_linear_unchecked(x_TD, weight_OD, bias_O, scales_TR, a, b)


def lora_linear_unchecked(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a: Stack,
    b: Stack,
) -> torch.Tensor:
    """`lora_linear` for a graph, whose tensors are known to fit: for one token, the checks would
    take noticeable time."""
    compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    plain = compiling and (torch.compiler.is_exporting() or not grad)  # what a compiler fuses
    if plain or autocasts(x.device.type):
        return reference.lora_linear(x, weight, bias, scales, a, b)
    if not grad and not compiling:  # skip the dispatch too
        return product(x, weight, bias, scales, a, b)
    a, b = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (a, b))
    save = grad and any(
        t is not None and t.requires_grad for t in (x, weight, bias, scales, *a, *b)
    )
    if compiling:
        return _lora(x, weight, bias, scales, a, b, save)[0]
    if not save:
        return product(x, weight, bias, scales, a, b)
    return _Eager.apply(x, weight, bias, scales, len(a), *a, *b)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
) -> None:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: expected (..., D) and (O, D)"
        )
    out, width = weight.shape
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({out},), one number an output")
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} parts of A, {len(b)} of B: expected equally many, at least one")
    for part, factor in zip(a, b, strict=True):
        if part.ndim != 2 or part.shape[1] != width or factor.shape != (out, part.shape[0]):
            raise ValueError(
                f"A {tuple(part.shape)} and B {tuple(factor.shape)}: expected (R, {width}) and "
                f"({out}, R) beside the weight {tuple(weight.shape)}"
            )
    rank, lead = sum(t.shape[0] for t in a), x.shape[:-1]
    given = scales.shape[:-1]
    if scales.shape[-1:] != (rank,) or len(given) > len(lead) or any(
        s not in (1, n) for s, n in zip(reversed(given), reversed(lead), strict=False)
    ):  # fmt: skip
        raise ValueError(
            f"scales {tuple(scales.shape)}: expected {(*lead, rank)} or what broadcasts to it over "
            "the leading dimensions"
        )
    tensors = [x, weight, *([] if bias is None else [bias]), scales, *a, *b]
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in tensors):
        kinds = ", ".join(dict.fromkeys(str(t.dtype) for t in tensors))
        raise ValueError(f"dtypes {kinds}: expected one floating-point dtype for all")
    if any(t.device != x.device for t in tensors):
        places = ", ".join(dict.fromkeys(str(t.device) for t in tensors))
        raise ValueError(f"tensors on {places}: expected all on one device")


class _Eager(torch.autograd.Function):
    """The op where nothing is compiled: a library's op takes 0.1 ms more, forward and backward each,
    which for 32 rows is more than the products."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        scales: torch.Tensor, count: int, *parts: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        y, low = forward(x, weight, bias, scales, parts[:count], parts[count:], True)
        ctx.count = count
        ctx.save_for_backward(x, weight, scales, low, *parts)
        return changeable(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales, low, *parts = ctx.saved_tensors
        need_x, need_w, need_bias, need_scales, _, *of_parts = wanted = ctx.needs_input_grad
        n = ctx.count
        needs = Needs(need_x, need_w, need_bias, need_scales, of_parts[:n], of_parts[n:])
        made = iter(backward(dy, x, weight, scales, low, parts[:n], parts[n:], needs))
        dx, dweight, dbias, dscales, _, *rest = (next(made) if need else None for need in wanted)
        return dx, dweight, dbias, dscales, None, *rest


@torch.library.custom_op("moe_rewrite::lora_linear", mutates_args=())
def _lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, low = forward(x, weight, bias, scales, a, b, save)
    return changeable(y), low


@_lora.register_fake
def _(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, _, scales, _, _, save = given
    low = x.new_empty((*x.shape[:-1], scales.shape[-1]) if save else (0,))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), low


@torch.library.custom_op("moe_rewrite::lora_linear_backward", mutates_args=())
def _lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    low: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order x, weight, bias, scales, A's parts, B's parts."""
    x_, weight_, bias_, scales_, *parts = needs
    wanted = Needs(x_, weight_, bias_, scales_, parts[: len(a)], parts[len(a) :])
    return backward(dy, x, weight, scales, low, a, b, wanted)


@_lora_backward.register_fake
def _(*given: Any) -> list[torch.Tensor]:
    dy, x, weight, scales, _, a, b, needs = given
    return empty_gradients([x, weight, dy.new_empty(weight.shape[:1]), scales, *a, *b], needs)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, scales, a, b, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.parts = len(a)
    ctx.save_for_backward(x, weight, scales, output[1], *a, *b)


def _backward(ctx: Any, dy: torch.Tensor, _: Any) -> Any:
    x, weight, scales, low, *parts = ctx.saved_tensors
    wanted, n = ctx.needs_input_grad, ctx.parts
    lists = [list(need) if isinstance(need, (list, tuple)) else [need] * n for need in wanted[4:6]]
    needs = [*wanted[:4], *lists[0], *lists[1]]
    run = torch.ops.moe_rewrite.lora_linear_backward
    made = iter(run(dy, x, weight, scales, low, parts[:n], parts[n:], needs))
    dx, dweight, dbias, dscales = (next(made) if need else None for need in needs[:4])
    da, db = ([next(made) if need else None for need in of] for of in lists)
    return dx, dweight, dbias, dscales, da, db, None


_lora.register_autograd(_backward, setup_context=_save)
