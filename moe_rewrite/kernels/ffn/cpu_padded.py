"""Stacked feed-forward experts with few rows each: groups padded to one size, as batched products.

T rows, S pairs in the plan's order, E experts, G rows of the largest group, D width, H hidden
width. A product of a few rows does not use all cores, a batch of E does. The padding is zero in x
and in dy, so it adds nothing to any gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..buffer_reuse import reused
from .activations import activate, activation_backward
from .cpu_plan import Gradients, HostPlan, Weights, combine, dot
from .reference import Stack


class Groups(NamedTuple):
    """Sorted pairs <-> padded groups.

    slot_S: index of each sorted pair among the E * G slots.
    pair_EG: index of each slot's pair.
    filling: slots that are padding.
    size: G.
    """

    slot_S: torch.Tensor
    pair_EG: torch.Tensor
    filling: torch.Tensor
    size: int

    @classmethod
    def of(cls, rows: HostPlan) -> Groups:
        ends, size = torch.tensor(rows.bounds), rows.largest
        within = torch.arange(size)
        taken = (within < ends.diff()[:, None]).view(-1)
        pair = (ends[:-1, None] + within).clamp_(max=len(rows.order_S) - 1).view(-1)
        return cls(taken.nonzero()[:, 0], pair, taken.logical_not_().nonzero()[:, 0], size)

    def gather(self, x_TD: torch.Tensor, rows: HostPlan) -> torch.Tensor:
        """(E, G, D): the rows of each group, padded."""
        given = x_TD.index_select(0, rows.tokens_S[self.pair_EG])
        return given.index_fill_(0, self.filling, 0).view(-1, self.size, x_TD.shape[1])

    def sorted(self, y_EGD: torch.Tensor, pairs: int) -> torch.Tensor:
        """(S, D): the rows in the plan's order; zero for dropped pairs."""
        y = y_EGD.flatten(0, 1).index_select(0, self.slot_S)
        return F.pad(y, (0, 0, 0, pairs - len(y)))


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: HostPlan, w: Weights, activation: str, save: bool,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `cpu.forward`."""
    groups, pairs = Groups.of(rows), len(rows.order_S)
    given = groups.gather(x, rows)
    made = [_linear(given, w.up, w.up_bias)]
    if len(w.gate):
        made.append(_linear(given, w.gate, w.gate_bias))
    size = len(made), pairs if save else 0, made[0].shape[-1]
    pre = reused(x, *size, owner=owner, use="products")
    if save:
        torch.stack([groups.sorted(m, pairs) for m in made], out=pre)
    act = activate(activation, made[-1], made[-1])
    if len(w.gate):
        act.mul_(made[0])
    y = groups.sorted(_linear(act, w.down, w.down_bias), pairs)
    return combine(y, rows.inverse_TK, gates), pre


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    pre: torch.Tensor,
    rows: HostPlan,
    w: Weights,
    activation: str,
    need_x: bool,
    need_gates: bool,
    into: Gradients,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `cpu.backward`."""
    groups, pairs = Groups.of(rows), len(rows.order_S)
    up, *gating = (p.index_select(0, groups.pair_EG).unflatten(0, (-1, groups.size)) for p in pre)
    weights = gates.reshape(-1).index_select(0, rows.order_S[groups.pair_EG])
    gate = weights.view(-1, groups.size, 1).to(x.dtype)
    grad = groups.gather(dy, rows)
    dhidden = torch.bmm(grad, _stack(w.down))
    act = activate(activation, gating[0] if gating else up, torch.empty_like(up))
    hidden = act * up if gating else act
    dgates = None
    if need_gates:
        dgate = dot(dhidden, hidden)
        if len(w.down_bias):
            dgate += torch.bmm(grad, _stack(w.down_bias)[:, :, None])[..., 0]
        dgates = gates.new_zeros(gates.numel())
        dgates[rows.order_S[: len(groups.slot_S)]] = dgate.view(-1)[groups.slot_S].to(gates.dtype)
        dgates = dgates.view_as(gates)
    if into.some():
        _gradients(grad * gate, hidden, into.down, into.down_bias)
    if gating:
        dgating = torch.mul(dhidden, up, out=hidden)
        activation_backward(activation, dgating, gating[0], dgating)
        dup = act.mul_(dhidden)
    else:
        dgating, dup = None, activation_backward(activation, dhidden, up, dhidden)
    if into.some():
        weighed = groups.gather(x, rows) * gate
        _gradients(dup, weighed, into.up, into.up_bias, gate)
        if dgating is not None:
            _gradients(dgating, weighed, into.gate, into.gate_bias, gate)
    if not need_x:
        return None, dgates
    dx = torch.bmm(dup, _stack(w.up))
    if dgating is not None:
        dx.baddbmm_(dgating, _stack(w.gate))
    return combine(groups.sorted(dx, pairs), rows.inverse_TK, gates), dgates


def _stack(w: Stack) -> torch.Tensor:
    assert isinstance(w, torch.Tensor)
    return w


def _linear(x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    y = torch.bmm(x, weight.transpose(1, 2))
    return y.add_(bias[:, None]) if len(bias) else y


def _gradients(
    left: torch.Tensor,
    right: torch.Tensor,
    weight: Any,
    bias: Any,
    gate: torch.Tensor | None = None,
) -> None:
    """``left^T right`` into `weight`, and the sum of left's rows (times `gate`, if given) into
    `bias`."""
    if len(weight):
        torch.bmm(left.transpose(1, 2), right, out=weight)
    if len(bias):
        torch.sum(left if gate is None else left * gate, 1, out=bias)
