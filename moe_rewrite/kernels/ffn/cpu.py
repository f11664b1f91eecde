"""Feed-forward experts on the CPU: a slice per expert of rows sorted once.

T rows, K experts a row takes, S = T * K pairs in the plan's order, D width, H hidden width.
Buffers of the largest group are used again for every expert, so that what lies between the
products stays in the cache. Gates are folded into arrays of width D, never into ones of width H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .activations import activate, activation_backward


class Weights(NamedTuple):
    """A list per kind, a tensor per expert; empty where the experts have no such tensor."""

    up: list[torch.Tensor]  # (H, D)
    down: list[torch.Tensor]  # (D, H)
    gate: list[torch.Tensor]  # (H, D)
    up_bias: list[torch.Tensor]  # (H,)
    gate_bias: list[torch.Tensor]  # (H,)
    down_bias: list[torch.Tensor]  # (D,)


class Gradients(NamedTuple):
    """As `Weights`; None for a tensor that needs no gradient."""

    up: list[torch.Tensor | None]
    down: list[torch.Tensor | None]
    gate: list[torch.Tensor | None]
    up_bias: list[torch.Tensor | None]
    gate_bias: list[torch.Tensor | None]
    down_bias: list[torch.Tensor | None]


class Rows(NamedTuple):
    """The plan at hand: bounds of the experts' groups on the host, and each pair's row.

    dense: every expert takes all rows in their order, so that nothing is gathered.
    """

    bounds: list[int]
    tokens_S: torch.Tensor
    order_S: torch.Tensor
    inverse_TK: torch.Tensor
    dense: bool

    @classmethod
    def of(
        cls, order: torch.Tensor, offsets: torch.Tensor, inverse: torch.Tensor, k: int, dense: bool
    ) -> Rows:
        return cls(offsets.tolist(), order // k, order, inverse.view(-1, k), dense)

    def largest(self) -> int:
        return max((hi - lo for _, lo, hi in self.groups()), default=0)

    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, first, end) of the experts that have rows."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        return [(e, lo, hi) for e, (lo, hi) in enumerate(pairs) if hi > lo]

    def gather(self, x_TD: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        if self.dense or len(x_TD) == 1:
            return x_TD
        return x_TD.index_select(0, self.tokens_S[lo:hi])


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: Rows, w: Weights, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (T, D), pre (1 or 2, S, H): up's and, where there is one, the gate's products)."""
    pairs, hidden = len(rows.order_S), w.up[0].shape[0]
    kinds = 2 if w.gate else 1
    y = x.new_empty(pairs, x.shape[1])
    y[rows.bounds[-1] :] = 0  # dropped pairs
    pre = x.new_empty(kinds, pairs if save else 0, hidden)
    largest = rows.largest()
    buffers = x.new_empty(1 if save else kinds, largest, hidden)
    for e, lo, hi in rows.groups():
        given, n = rows.gather(x, lo, hi), hi - lo
        act = buffers[-1, :n]
        up = _linear(given, w.up[e], w.up_bias, e, pre[0, lo:hi] if save else buffers[0, :n])
        if w.gate:
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
    gates_S = gates.reshape(-1).index_select(0, rows.order_S)
    dx = x.new_empty(len(gates_S), x.shape[1]) if need_x else None
    dgates = gates.new_zeros(gates.numel()) if need_gates else None
    if dx is not None:
        dx[rows.bounds[-1] :] = 0
    trained = any(t is not None for kind in into for t in kind)
    buffers = x.new_empty(3, rows.largest(), pre.shape[-1])
    for e, lo, hi in rows.groups():
        grad, gate = rows.gather(dy, lo, hi), gates_S[lo:hi, None].to(x.dtype)
        dhidden, act, spare = buffers[:, : hi - lo]
        torch.mm(grad, w.down[e], out=dhidden)
        up = pre[0, lo:hi]
        activate(activation, pre[1, lo:hi] if w.gate else up, act)
        hidden = torch.mul(act, up, out=spare) if w.gate else act
        if dgates is not None:
            dgate = _dot(dhidden, hidden)
            if w.down_bias:
                dgate += torch.mv(grad, w.down_bias[e])
            dgates[rows.order_S[lo:hi]] = dgate.to(gates.dtype)
        if trained:
            _down_gradients(grad * gate, hidden, e, into)
        if w.gate:
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
    for kind in into:
        for e, gradient in enumerate(kind):
            if gradient is not None and rows.bounds[e] == rows.bounds[e + 1]:
                gradient.zero_()
    if dx is not None:
        dx = combine(dx, rows.inverse_TK, gates)
    return dx, None if dgates is None else dgates.view_as(gates)


def _down_gradients(weighed: torch.Tensor, hidden: torch.Tensor, e: int, into: Gradients) -> None:
    if into.down and (down := into.down[e]) is not None:
        torch.mm(weighed.t(), hidden, out=down)
    if into.down_bias and (bias := into.down_bias[e]) is not None:
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
        if weights and (weight := weights[e]) is not None:
            torch.mm(grad.t(), weighed_x, out=weight)
        if biases and (bias := biases[e]) is not None:
            torch.mv(grad.t(), gate[:, 0], out=bias)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n,) inner products of rows, in fp32 or more."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(a, b)
    return (a * b).sum(-1, dtype=torch.float32)


def combine(y_SD: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """``sum_k gates[t, k] * y[inverse[t, k]]``, in the order of k, accumulated in fp32 or more."""
    if y_SD.dtype in (torch.float32, torch.float64) and len(y_SD):
        weights = gates_TK.to(y_SD.dtype)
        offsets = torch.arange(0, inverse_TK.numel(), inverse_TK.shape[1])
        flat = inverse_TK.reshape(-1)
        bag = torch.ops.aten._embedding_bag_forward_only
        return bag(y_SD, flat, offsets, False, 0, False, weights.reshape(-1))[0]
    total = y_SD.new_zeros(len(inverse_TK), y_SD.shape[1], dtype=torch.float32)
    for k in range(inverse_TK.shape[1]):
        total.addcmul_(y_SD.index_select(0, inverse_TK[:, k]).float(), gates_TK[:, k, None])
    return total.to(y_SD.dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, biases: list[torch.Tensor], e: int, out: torch.Tensor
) -> torch.Tensor:
    if biases:
        return torch.addmm(biases[e], x, weight.t(), out=out)
    return torch.mm(x, weight.t(), out=out)
