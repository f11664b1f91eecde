"""Stacked feed-forward experts with few rows each: groups padded to one size, as batched products.

T rows, S pairs in the plan's order, E experts of a range, G rows of its largest group, D width, H
hidden width. A product of a few rows does not use all cores, a batch of E does. Where there is much
to do, ranges of a few neighbouring experts are padded each to its own largest group, and each core
takes whole ranges. The padding is zero in x and in dy, so it adds nothing to any gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..buffer_reuse import reused
from ..cpu_threads import spread
from .activations import activate, activation_backward
from .cpu_plan import SPREAD, Gradients, HostPlan, Weights, combine, divided, dot
from .reference import Stack

TOGETHER = 4  # experts of a range (measured on 2 cores)


class Groups(NamedTuple):
    """Sorted pairs of a range of experts <-> padded groups.

    experts: the range.
    pairs: its pairs.
    slot_P: index of each of its pairs among the E * G slots.
    pair_EG: index of each slot's pair among all.
    filling: slots that are padding.
    size: G.
    """

    experts: slice
    pairs: slice
    slot_P: torch.Tensor
    pair_EG: torch.Tensor
    filling: torch.Tensor
    size: int

    @classmethod
    def of(cls, rows: HostPlan, experts: slice) -> Groups:
        bounds = rows.bounds[experts.start : experts.stop + 1]
        ends = torch.tensor(bounds)
        counts = ends.diff()[:, None]
        size = int(counts.max())
        within = torch.arange(size)
        taken = (within < counts).view(-1)
        pair = (ends[:-1, None] + within).clamp_(max=len(rows.order_S) - 1).view(-1)
        filling = taken.logical_not().nonzero()[:, 0]
        pairs = slice(bounds[0], bounds[-1])
        return cls(experts, pairs, taken.nonzero()[:, 0], pair, filling, size)

    def gather(self, x_TD: torch.Tensor, rows: HostPlan) -> torch.Tensor:
        """(E, G, D): the rows of each group, padded."""
        given = x_TD.index_select(0, rows.tokens_S[self.pair_EG])
        return given.index_fill_(0, self.filling, 0).view(-1, self.size, x_TD.shape[1])

    def sort(self, y_EGD: torch.Tensor, into_SD: torch.Tensor) -> None:
        """Write the rows of the range's pairs, in the plan's order."""
        torch.index_select(y_EGD.flatten(0, 1), 0, self.slot_P, out=into_SD[self.pairs])


def _ranges(rows: HostPlan, products: int) -> tuple[list[slice], list[list[int]]]:
    """(ranges of experts with rows, which of them each core takes). products: multiplications of a
    pair; one range if all are few."""
    count, bounds = len(rows.bounds) - 1, rows.bounds
    step = TOGETHER if bounds[-1] * products >= SPREAD else count
    ranges = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    ranges = [r for r in ranges if bounds[r.stop] > bounds[r.start]]
    return ranges, divided([bounds[r.stop] - bounds[r.start] for r in ranges], products)


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: HostPlan, w: Weights, activation: str, save: bool,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `cpu.forward`."""
    kinds, pairs, hidden = 2 if len(w.gate) else 1, len(rows.order_S), w.up[0].shape[0]
    pre = reused(x, kinds, pairs if save else 0, hidden, owner=owner, use="products")
    rows.clear_dropped(pre.transpose(0, 1))
    y = rows.clear_dropped(x.new_empty(pairs, x.shape[1]))
    ranges, shares = _ranges(rows, hidden * x.shape[1])

    def work(share: int) -> None:
        for i in shares[share]:
            groups = Groups.of(rows, ranges[i])
            own = Weights(*(k[groups.experts] for k in w))
            given = groups.gather(x, rows)
            made = [_linear(given, own.up, own.up_bias)]
            if len(own.gate):
                made.append(_linear(given, own.gate, own.gate_bias))
            for into, values in zip(pre if save else (), made, strict=False):
                groups.sort(values, into)
            act = activate(activation, made[-1], made[-1])
            if len(own.gate):
                act.mul_(made[0])
            groups.sort(_linear(act, own.down, own.down_bias), y)

    spread(work, len(shares))
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
    dx = rows.clear_dropped(x.new_empty(len(rows.order_S), x.shape[1])) if need_x else None
    dgates = gates.new_zeros(gates.numel()) if need_gates else None
    ranges, shares = _ranges(rows, x.shape[1] * pre.shape[-1])
    _clear_idle(ranges, rows, into)

    def work(share: int) -> None:
        for i in shares[share]:
            groups = Groups.of(rows, ranges[i])
            own = Weights(*(k[groups.experts] for k in w))
            grads = Gradients(*(k[groups.experts] if len(k) else k for k in into))
            _backward(groups, dy, x, gates, pre, rows, own, activation, dx, dgates, grads)

    spread(work, len(shares))
    return (
        None if dx is None else combine(dx, rows.inverse_TK, gates),
        None if dgates is None else dgates.view_as(gates),
    )


def _backward(
    groups: Groups, dy: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, pre: torch.Tensor,
    rows: HostPlan, w: Weights, activation: str, dx: torch.Tensor | None,
    dgates: torch.Tensor | None, into: Gradients,
) -> None:  # fmt: skip
    """Write the gradients of one range: of its pairs' rows into `dx`, of their gates into `dgates`."""
    up, *gating = (p.index_select(0, groups.pair_EG).unflatten(0, (-1, groups.size)) for p in pre)
    weights = gates.reshape(-1).index_select(0, rows.order_S[groups.pair_EG])
    gate = weights.view(-1, groups.size, 1).to(x.dtype)
    grad = groups.gather(dy, rows)
    dhidden = torch.bmm(grad, _stack(w.down))
    act = activate(activation, gating[0] if gating else up, torch.empty_like(up))
    hidden = act * up if gating else act
    if dgates is not None:
        dgate = dot(dhidden, hidden)
        if len(w.down_bias):
            dgate += torch.bmm(grad, _stack(w.down_bias)[:, :, None])[..., 0]
        dgates[rows.order_S[groups.pairs]] = dgate.view(-1)[groups.slot_P].to(gates.dtype)
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
    if dx is not None:
        own = torch.bmm(dup, _stack(w.up))
        if dgating is not None:
            own.baddbmm_(dgating, _stack(w.gate))
        groups.sort(own, dx)


def _clear_idle(ranges: list[slice], rows: HostPlan, into: Gradients) -> None:
    """Set the gradients of experts of no range to zero."""
    idle = set(range(len(rows.bounds) - 1)).difference(*(range(r.start, r.stop) for r in ranges))
    for kind in into:
        for e in idle if len(kind) else ():
            kind[e].zero_()


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
