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
from . import cpu_one_row
from .arguments import KINDS, check, check_plan, expert_count, stacked, weight_lists
from .cpu import backward, forward
from .cpu_plan import Gradients, HostPlan, Weights
from .reference import Stack

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
    lists = weight_lists(up_EHD, down_EDH, gate_EHD, up_bias_EH, gate_bias_EH, down_bias_ED)
    check(x_TD, gates_TK, experts_TK, lists, activation, joined)
    count = expert_count(lists[0])
    if plan is not None:
        check_plan(plan, experts_TK, count)
    if _is_decoded_row(x_TD, gates_TK, lists):
        row, gates, experts = (t.reshape(1, -1) for t in (x_TD, gates_TK, experts_TK))
        w = _by_expert(lists, joined=False)
        return cpu_one_row.forward(row, gates, experts, w, activation, joined).view(x_TD.shape)
    if plan is None:
        from ..plan.op import sort_plan

        plan = sort_plan(experts_TK, count)
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
    lists = weight_lists(up_EHD, down_EDH, gate_EHD, up_bias_EH, gate_bias_EH, down_bias_ED)
    experts = expert_count(lists[0])
    check(x_TD, gates_TE, None, lists, activation)
    if gates_TE.shape[-1] != experts:
        raise ValueError(f"gates of {gates_TE.shape[-1]} experts: expected all {experts}")
    plan = dense_plan(x_TD.shape[:-1].numel(), experts, x_TD.device)
    return _run(x_TD, gates_TE, plan, lists, activation, joined=False, dense=True)


def _is_decoded_row(x: torch.Tensor, gates: torch.Tensor, lists: list[list[torch.Tensor]]) -> bool:
    """Whether this is one row on the CPU, without a backward pass and outside of any trace."""
    one = x.device.type == "cpu" and x.numel() == x.shape[-1] > 0
    plain = one and not _has_kernels(x, lists[0]) and not _is_traced()
    return plain and not _needs_gradients(x, gates, lists)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _needs_gradients(x: torch.Tensor, gates: torch.Tensor, lists: list[list[torch.Tensor]]) -> bool:
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, gates, *(w for kind in lists for w in kind))
    )


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
    save = _needs_gradients(x, gates, lists)
    gates = gates.reshape(-1, gates.shape[-1])
    run: Any = _ffn if save or _is_traced() else _ffn_forward
    y, _ = run(flat, gates, *plan, *lists, activation, joined, dense, save)
    return y.view(x.shape)


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
    return Weights(*(w[0] if stacked(kind, w) else list(w) for kind, w in parted))


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
        is_stack = whole is not None and stacked(kind, [whole])
        kinds.append(whole if is_stack else made if any(g is not None for g in made) else [])
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
