"""Feed-forward experts as one op: `ffn_experts` over a plan, `ffn_dense` on all rows.

T rows, D width, H hidden width, E experts, K experts a row. Saved for the backward pass: the inputs
and the products before the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..buffer_reuse import reused
from ..plan.op import Plan, dense_plan
from ..triton import runs_on
from .cpu import backward, forward
from .cpu_plan import Gradients, HostPlan, Weights
from .reference import ACTIVATIONS, Stack

__all__ = ["ffn_dense", "ffn_experts"]


def ffn_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    plan: Plan | None,
    up_EHD: Stack,
    down_EDH: Stack,
    gate_EHD: Stack | None = None,
    up_bias_EH: Stack | None = None,
    gate_bias_EH: Stack | None = None,
    down_bias_ED: Stack | None = None,
    activation: str = "silu",
    joined: bool = False,
) -> torch.Tensor:
    """``y_t = sum_k gates[t, k] * FFN_{experts[t, k]}(x_t)`` (arXiv 1701.06538, equation 1), with
    ``FFN(x) = down(act(gate x) * (up x))``, or ``down(act(up x))`` without gate.

    x_TD, gates_TK, experts_TK (int64): the same leading dimensions, of any number.
    plan: the result of `sort_plan` for these experts, or None.
    up, down, gate and biases: stacks, or lists of one tensor an expert, of x's dtype (fp32, bf16,
        fp16; fp64 on the CPU). Products are accumulated in fp32.
    joined: up and its bias are stacks (E, 2H, D) and (E, 2H) that hold the gate's rows before up's,
        as transformers stores them; their gradients then are one tensor too.
    activation: relu, gelu, gelu_tanh, silu, relu2, quick_gelu or identity.

    Differentiable once with respect to x, the gates, weights and biases. Two runs give the same
    bits. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    lists = _weights(up_EHD, down_EDH, gate_EHD, up_bias_EH, gate_bias_EH, down_bias_ED)
    _check(x_TD, gates_TK, experts_TK, lists, activation, joined)
    if plan is None:
        from ..plan.op import sort_plan

        plan = sort_plan(experts_TK, _count(lists[0]))
    _check_plan(plan, experts_TK, _count(lists[0]))
    return _run(x_TD, gates_TK, plan, lists, activation, joined, dense=False)


def ffn_dense(
    x_TD: torch.Tensor,
    gates_TE: torch.Tensor,
    up_EHD: Stack,
    down_EDH: Stack,
    gate_EHD: Stack | None = None,
    up_bias_EH: Stack | None = None,
    gate_bias_EH: Stack | None = None,
    down_bias_ED: Stack | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Every expert on every row, ``y_t = sum_e gates[t, e] * FFN_e(x_t)``: nothing is sorted or
    gathered. For few rows, or if K is close to E. Arguments and errors as for `ffn_experts`."""
    lists = _weights(up_EHD, down_EDH, gate_EHD, up_bias_EH, gate_bias_EH, down_bias_ED)
    experts = _count(lists[0])
    _check(x_TD, gates_TE, None, lists, activation)
    if gates_TE.shape[-1] != experts:
        raise ValueError(f"gates of {gates_TE.shape[-1]} experts: expected all {experts}")
    plan = dense_plan(x_TD.shape[:-1].numel(), experts, x_TD.device)
    return _run(x_TD, gates_TE, plan, lists, activation, joined=False, dense=True)


def _run(
    x: torch.Tensor,
    gates: torch.Tensor,
    plan: Plan,
    lists: list[list[torch.Tensor]],
    activation: str,
    joined: bool,
    dense: bool,
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, gates, *(w for kind in lists for w in kind))
    )
    gates = gates.reshape(-1, gates.shape[-1])
    run: Any = (
        _ffn
        if save or torch.compiler.is_compiling() or torch.compiler.is_exporting()
        else _ffn_forward
    )
    y, _ = run(flat, gates, *plan, *lists, activation, joined, dense, save)
    return y.view(x.shape)


def _weights(*given: Stack | None) -> list[list[torch.Tensor]]:
    """A list for each kind: with one stack, with one tensor an expert, or empty."""
    return [[] if w is None else [w] if isinstance(w, torch.Tensor) else list(w) for w in given]


KINDS = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")


def _stacked(kind: str, weights: Sequence[torch.Tensor]) -> bool:
    return len(weights) == 1 and weights[0].ndim == (2 if kind.endswith("bias") else 3)


def _count(up: list[torch.Tensor]) -> int:
    return len(up[0]) if _stacked("up", up) else len(up)


def _check(
    x: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor | None,
    lists: list[list[torch.Tensor]],
    activation: str,
    joined: bool = False,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if not x.is_floating_point() or not gates.is_floating_point():
        raise ValueError(f"x is {x.dtype} and gates {gates.dtype}: expected floating-point dtypes")
    if gates.shape[:-1] != x.shape[:-1] or (experts is not None and experts.shape != gates.shape):
        got = None if experts is None else tuple(experts.shape)
        raise ValueError(
            f"x {tuple(x.shape)}, gates {tuple(gates.shape)}, experts {got}: expected gates and "
            "experts of one shape, with the leading dimensions of x"
        )
    if not lists[0] or lists[4] and not lists[2]:
        raise ValueError("expected at least one expert, and no gate bias without a gate")
    if joined and (lists[2] or not _stacked("up", lists[0]) or lists[0][0].shape[1] % 2):
        raise ValueError(f"joined: expected up as one stack (E, 2H, D), got {lists[0][0].shape}")
    count, width, rows = _count(lists[0]), x.shape[-1], lists[0][0].shape[-2]
    hidden = rows // 2 if joined else rows
    matrix, turned, row, column = (rows, width), (width, hidden), (rows,), (width,)
    sizes = matrix, turned, matrix, row, row, column
    for kind, weights, size in zip(KINDS, lists, sizes, strict=True):
        if not weights:
            continue
        shape, many = size, len(weights)
        if _stacked(kind, weights):
            shape, many = (count, *size), count
        if many != count:
            raise ValueError(f"{kind} of {many} experts: expected {count}, as many as up has")
        for w in weights:
            if w.shape != shape or w.dtype != x.dtype or w.device != x.device:
                raise ValueError(
                    f"{kind} is {tuple(w.shape)} {w.dtype} on {w.device}: expected {shape} "
                    f"{x.dtype} on {x.device}, for x {tuple(x.shape)} and up's first "
                    f"{tuple(lists[0][0].shape)}"
                )


def _check_plan(plan: Plan, experts: torch.Tensor, count: int) -> None:
    pairs = experts.numel()
    sizes = [len(t) for t in plan]
    if sizes != [pairs, count + 1, pairs]:
        raise ValueError(
            f"plan of sizes {sizes}: expected {[pairs, count + 1, pairs]}, the plan of these "
            f"experts {tuple(experts.shape)} among {count}"
        )


def _parted(lists: Sequence[Sequence[Any]], joined: bool) -> Sequence[Sequence[Any]]:
    """The lists of weights, or of gradients, with the gates of a joined stack in their own places."""
    if not joined:
        return lists
    up, down, _, up_bias, _, down_bias = lists
    gate, up, gate_bias, up_bias = (
        [None if w is None else w.chunk(2, 1)[half] for w in kind]
        for kind in (up, up_bias)
        for half in (0, 1)
    )
    return up, down, gate, up_bias, gate_bias, down_bias


def _by_expert(lists: Sequence[Sequence[torch.Tensor]], joined: bool) -> Weights:
    """Each kind as something that is indexed by expert: a stack, or a list."""
    parted = zip(KINDS, _parted(lists, joined), strict=True)
    return Weights(*(w[0] if _stacked(kind, w) else list(w) for kind, w in parted))


def _has_kernels(x: torch.Tensor, up: Sequence[torch.Tensor]) -> bool:
    return runs_on(x) and x.numel() > 0 and up[0].numel() > 0


def _ffn_forward(
    x: torch.Tensor,
    gates: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    inverse: torch.Tensor,
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate: list[torch.Tensor],
    up_bias: list[torch.Tensor],
    gate_bias: list[torch.Tensor],
    down_bias: list[torch.Tensor],
    activation: str,
    joined: bool,
    dense: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (T, D), pre (1 or 2, T * K, H)); pre has no rows if it is not saved."""
    lists = (up, down, gate, up_bias, gate_bias, down_bias)
    if _has_kernels(x, up):
        from . import launch

        parted = _parted(lists, joined)
        return launch.forward(x, gates, order, offsets, inverse, parted, activation, save)
    width, hidden = down[0].shape[-2:]
    rows = HostPlan.of(order, offsets, inverse, gates.shape[1], hidden, width, dense)
    return forward(x, gates, rows, _by_expert(lists, joined), activation, save, owner=up[0])


# with few tokens the op's dispatch takes noticeable time, so `_run` bypasses it if it can
_ffn = torch.library.custom_op("moe_rewrite::ffn_experts", _ffn_forward, mutates_args=())


@_ffn.register_fake
def _(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, _, order, _, _, _, down, gate, *_, joined, _, save = given
    rows = order.shape[0] if save else 0
    return torch.empty_like(x), x.new_empty(2 if gate or joined else 1, rows, down[0].shape[-1])


@torch.library.custom_op("moe_rewrite::ffn_experts_backward", mutates_args=())
def _ffn_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    inverse: torch.Tensor,
    pre: torch.Tensor,
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate: list[torch.Tensor],
    up_bias: list[torch.Tensor],
    gate_bias: list[torch.Tensor],
    down_bias: list[torch.Tensor],
    activation: str,
    joined: bool,
    dense: bool,
    needs: list[bool],
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order x, gates, then the weights kind by kind."""
    lists = (up, down, gate, up_bias, gate_bias, down_bias)
    into, made = _new_gradients(lists, needs[2:], _gradient_memory)
    if _has_kernels(x, up):
        from . import launch

        made_first = launch.backward(
            dy, x, gates, order, offsets, inverse, pre, _parted(lists, joined), activation,
            needs[0], needs[1], _gradients_by_expert(_parted(into, joined)),
        )  # fmt: skip
        return [g for g in made_first if g is not None] + made
    width, hidden = down[0].shape[-2:]
    rows = HostPlan.of(order, offsets, inverse, gates.shape[1], hidden, width, dense)
    dx, dgates = backward(
        dy.contiguous(), x, gates, pre, rows, _by_expert(lists, joined), activation,
        needs[0], needs[1], _gradients_by_expert(_parted(into, joined)),
    )  # fmt: skip
    return [g for g in (dx, dgates) if g is not None] + made


@_ffn_backward.register_fake
def _(*given: Any) -> list[torch.Tensor]:
    _, x, gates, _, _, _, _, *lists, _, _, _, needs = given
    first = [torch.empty_like(t) for t, need in zip((x, gates), needs[:2], strict=True) if need]
    return first + _new_gradients(lists, needs[2:], lambda w: w.new_empty(w.shape))[1]


def _gradient_memory(weight: torch.Tensor) -> torch.Tensor:
    return reused(weight, *weight.shape, owner=weight, use="gradient")


def _new_gradients(
    lists: Sequence[Sequence[torch.Tensor]],
    needs: Sequence[bool],
    empty: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[list[torch.Tensor | None]], list[torch.Tensor]]:
    """(uninitialised gradients in the structure of `lists`, None if not needed; those made)."""
    wanted = iter(needs)
    into = [[empty(w) if next(wanted) else None for w in kind] for kind in lists]
    return into, [g for kind in into for g in kind if g is not None]


def _gradients_by_expert(into: Sequence[Sequence[torch.Tensor | None]]) -> Gradients:
    kinds: list[Any] = []
    for kind, made in zip(KINDS, into, strict=True):
        whole = made[0] if len(made) == 1 else None
        stacked = whole is not None and _stacked(kind, [whole])
        kinds.append(whole if stacked else made if any(g is not None for g in made) else [])
    return Gradients(*kinds)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, gates, order, offsets, inverse, *lists, ctx.activation, ctx.joined, ctx.dense, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros as large as output[1]
    ctx.sizes = [len(kind) for kind in lists]
    flat = [w for kind in lists for w in kind]
    ctx.save_for_backward(x, gates, order, offsets, inverse, output[1], *flat)


def _backward(ctx: Any, dy: torch.Tensor, _: Any) -> Any:
    x, gates, order, offsets, inverse, pre, *flat = ctx.saved_tensors
    rest = iter(flat)
    lists = [[next(rest) for _ in range(size)] for size in ctx.sizes]
    wanted = ctx.needs_input_grad
    kinds = [
        list(need) if isinstance(need, (list, tuple)) else [need] * size
        for need, size in zip(wanted[5:11], ctx.sizes, strict=True)
    ]
    needs = [wanted[0], wanted[1], *(n for kind in kinds for n in kind)]
    made = iter(torch.ops.moe_rewrite.ffn_experts_backward(
        dy, x, gates, order, offsets, inverse, pre, *lists,
        ctx.activation, ctx.joined, ctx.dense, needs,
    ))  # fmt: skip
    dx, dgates = (next(made) if need else None for need in needs[:2])
    weights = [[next(made) if need else None for need in kind] for kind in kinds]
    return dx, dgates, None, None, None, *weights, None, None, None, None


_ffn.register_autograd(_backward, setup_context=_save)
