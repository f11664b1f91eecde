"""Feed-forward experts on the CPU: a slice per expert of rows sorted once.

T rows, K experts a row takes, S = T * K pairs in the plan's order, D width, H hidden width.
Buffers of the largest group are used again for every expert, so that what lies between the
products stays in the cache. Gates are folded into arrays of width D, never into ones of width H.
"""

from __future__ import annotations

import torch

from . import equal
from .activations import activate, activation_backward
from .reference import Stack
from .rows import Gradients, Rows, Weights, combine, dot


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: Rows, w: Weights, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (T, D), pre (1 or 2, S, H): up's and, where there is one, the gate's products)."""
    if w.stacked() and rows.even():
        return equal.forward(x, gates, rows, w, activation, save)
    pairs, hidden = len(rows.order_S), w.up[0].shape[0]
    kinds = 2 if len(w.gate) else 1
    y = x.new_empty(pairs, x.shape[1])
    y[rows.bounds[-1] :] = 0  # dropped pairs, here and below
    pre = x.new_empty(kinds, pairs if save else 0, hidden)
    pre[:, rows.bounds[-1] :] = 0
    largest = rows.largest
    buffers = x.new_empty(1 if save else kinds, largest, hidden)
    for e, lo, hi in rows.groups:
        given, n = rows.gather(x, lo, hi), hi - lo
        act = buffers[-1, :n]
        up = _linear(given, w.up[e], w.up_bias, e, pre[0, lo:hi] if save else buffers[0, :n])
        if len(w.gate):
            into = pre[1, lo:hi] if save else act
            activate(activation, _linear(given, w.gate[e], w.gate_bias, e, into), act)
            act.mul_(up)
        else:
            activate(activation, up, act)
        _linear(act, w.down[e], w.down_bias, e, y[lo:hi])
    return combine(y, rows.inverse_TK, gates), pre


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    pre: torch.Tensor,
    rows: Rows,
    w: Weights,
    activation: str,
    need_x: bool,
    need_gates: bool,
    into: Gradients,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dgates); the gradients of the weights go into the tensors of `into`, where there is one.

    Per expert, with ungated products throughout: ``dhidden = dy down``, ``dgate = <dhidden,
    hidden>``; the gates weigh the rows of dy, x and dx instead of those of width H.
    """
    if w.stacked() and rows.even():
        return equal.backward(dy, x, gates, pre, rows, w, activation, need_x, need_gates, into)
    gates_S = gates.reshape(-1).index_select(0, rows.order_S)
    dx = x.new_empty(len(gates_S), x.shape[1]) if need_x else None
    dgates = gates.new_zeros(gates.numel()) if need_gates else None
    if dx is not None:
        dx[rows.bounds[-1] :] = 0
    trained = into.some()
    buffers = x.new_empty(3, rows.largest, pre.shape[-1])
    for e, lo, hi in rows.groups:
        grad, gate = rows.gather(dy, lo, hi), gates_S[lo:hi, None].to(x.dtype)
        dhidden, act, spare = buffers[:, : hi - lo]
        torch.mm(grad, w.down[e], out=dhidden)
        up = pre[0, lo:hi]
        activate(activation, pre[1, lo:hi] if len(w.gate) else up, act)
        hidden = torch.mul(act, up, out=spare) if len(w.gate) else act
        if dgates is not None:
            dgate = dot(dhidden, hidden)
            if len(w.down_bias):
                dgate += torch.mv(grad, w.down_bias[e])
            dgates[rows.order_S[lo:hi]] = dgate.to(gates.dtype)
        if trained:
            _down_gradients(grad * gate, hidden, e, into)
        if len(w.gate):
            dgating = torch.mul(dhidden, up, out=spare)
            activation_backward(activation, dgating, pre[1, lo:hi], dgating)
            dup = act.mul_(dhidden)
        else:
            dgating, dup = None, activation_backward(activation, dhidden, up, dhidden)
        if trained:
            _up_gradients(dup, dgating, rows.gather(x, lo, hi) * gate, gate, e, into)
        if dx is not None:
            torch.mm(dup, w.up[e], out=dx[lo:hi])
            if dgating is not None:
                dx[lo:hi].addmm_(dgating, w.gate[e])
    idle = set(range(len(rows.bounds) - 1)) - {e for e, _, _ in rows.groups}
    for kind in into:
        for e in idle if len(kind) else ():
            if kind[e] is not None:
                kind[e].zero_()
    if dx is not None:
        dx = combine(dx, rows.inverse_TK, gates)
    return dx, None if dgates is None else dgates.view_as(gates)


def _down_gradients(weighed: torch.Tensor, hidden: torch.Tensor, e: int, into: Gradients) -> None:
    if len(into.down) and (down := into.down[e]) is not None:
        torch.mm(weighed.t(), hidden, out=down)
    if len(into.down_bias) and (bias := into.down_bias[e]) is not None:
        torch.sum(weighed, 0, out=bias)


def _up_gradients(
    dup: torch.Tensor,
    dgating: torch.Tensor | None,
    weighed_x: torch.Tensor,
    gate: torch.Tensor,
    e: int,
    into: Gradients,
) -> None:
    for grad, weights, biases in (
        (dup, into.up, into.up_bias),
        (dgating, into.gate, into.gate_bias),
    ):
        if grad is None:
            continue
        if len(weights) and (weight := weights[e]) is not None:
            torch.mm(grad.t(), weighed_x, out=weight)
        if len(biases) and (bias := biases[e]) is not None:
            torch.mv(grad.t(), gate[:, 0], out=bias)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, biases: Stack, e: int, out: torch.Tensor
) -> torch.Tensor:
    if len(biases):
        return torch.addmm(biases[e], x, weight.t(), out=out)
    return torch.mm(x, weight.t(), out=out)
