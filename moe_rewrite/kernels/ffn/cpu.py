"""Feed-forward experts on the CPU: products of each expert's rows, sorted once.

T rows, K experts a row takes, S pairs as in rows.py, D width, H hidden width. Where a product takes
the groups of several experts at once its arguments have a dimension in front, that of the experts.
Buffers of one batch of groups are used again for all, so that what lies between the products stays
in the cache. Gates are folded into arrays of width D, never into ones of width H.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ..memory import reused
from . import equal
from .activations import activate, activation_backward
from .rows import Batch, Gradients, Maps, Rows, Weights, combine, dot, saved_rows


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: Rows, w: Weights, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (T, D), pre (1 or 2, S, H): up's and, where there is one, the gate's products)."""
    if w.stacked() and rows.even():
        return equal.forward(x, gates, rows, w, activation, save)
    ups, gatings, downs = (
        rows.maps(*k) for k in ((w.up, w.up_bias), (w.gate, w.gate_bias), (w.down, w.down_bias))
    )
    kinds, hidden = 2 if len(w.gate) else 1, w.up[0].shape[0]
    pre = x.new_empty(kinds, 0, hidden)
    if save:
        places = saved_rows(x, gates.numel(), w.up)
        pre = reused(x, kinds, places, hidden, owner=w.owner(), use="products")
        rows.clear_dropped(pre.transpose(0, 1))
        saved = rows.split(pre[0]), rows.split(pre[-1])
    y = _pairs(rows, x)
    taken = _buffer(x, "rows", 1, rows.longest, x.shape[1])[0]
    buffers = _buffer(x, "hidden", 2, rows.longest, hidden)
    for i, (b, tokens, made) in enumerate(
        zip(rows.batches, rows.split(rows.tokens_S), rows.split(y), strict=True)
    ):
        given = rows.gather(x, tokens, taken[: b.rows])
        lifted, act = buffers[:, : b.rows]
        gating = act
        if save:
            lifted, gating = saved[0][i], saved[1][i]
        _products(b, given, ups, lifted)
        if gatings:
            _products(b, given, gatings, gating)
            activate(activation, gating, act).mul_(lifted)
        else:
            activate(activation, lifted, act)
        _products(b, act, downs, made)
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

    With ungated products throughout: ``dhidden = dy down``, ``dgate = <dhidden, hidden>``; the
    gates weigh the rows of dy, x and dx instead of those of width H.
    """
    if w.stacked() and rows.even():
        return equal.backward(dy, x, gates, pre, rows, w, activation, need_x, need_gates, into)
    up, down, gate, _, _, down_bias = map(rows.each, w)
    grads, trained = Gradients(*map(rows.each, into)), into.some()
    weights_S1 = gates.reshape(-1, 1).index_select(0, rows.order_S).to(x.dtype)
    if rows.filling is not None:
        weights_S1[rows.filling] = 0
    dgates_S = x.new_zeros(len(rows.order_S), dtype=gates.dtype)
    dx = _pairs(rows, x) if need_x else None
    owns = rows.split(dx) if dx is not None else [None] * len(rows.batches)
    taken, weighed = _buffer(x, "rows", 2, rows.longest, x.shape[1])
    buffers = _buffer(x, "hidden", 3, rows.longest, pre.shape[-1])
    of_pairs = rows.tokens_S, weights_S1, pre[0], pre[-1], dgates_S
    for b, own, tokens, weights, lifted, gating, dgates in zip(
        rows.batches, owns, *map(rows.split, of_pairs), strict=True
    ):
        dhidden, act, spare = buffers[:, : b.rows]
        grad, scaled = rows.gather(dy, tokens, taken[: b.rows]), weighed[: b.rows]
        _products_back(b, grad, down, dhidden)
        activate(activation, gating, act)
        hidden = torch.mul(act, lifted, out=spare) if gate else act
        if need_gates:
            dgates.copy_(dot(dhidden, hidden))
            for bias, part, values in b.zip(down_bias, dgates, grad):
                part += torch.matmul(values, bias[..., None])[..., 0]
        if trained:
            _down_gradients(b, torch.mul(grad, weights, out=scaled), hidden, grads)
        dgating = None
        if gate:
            dgating = torch.mul(dhidden, lifted, out=spare)
            activation_backward(activation, dgating, gating, dgating)
            dup = act.mul_(dhidden)
        else:
            dup = activation_backward(activation, dhidden, lifted, dhidden)
        if trained:
            torch.mul(rows.gather(x, tokens, taken[: b.rows]), weights, out=scaled)
            _up_gradients(b, dup, scaled, weights, grads.up, grads.up_bias)
            if dgating is not None:
                _up_gradients(b, dgating, scaled, weights, grads.gate, grads.gate_bias)
        if own is not None:
            _products_back(b, dup, up, own)
            if dgating is not None:
                for weight, part, left in b.zip(gate, own, dgating):
                    _add_product(part, left, weight)
    _clear_idle(rows, into)
    flat = rows.inverse_TK.flatten()
    return (
        None if dx is None else combine(dx, rows.inverse_TK, gates),
        dgates_S.index_select(0, flat).view_as(gates) if need_gates else None,
    )


def _pairs(rows: Rows, x: torch.Tensor) -> torch.Tensor:
    """(S, D), zero for dropped pairs, unwritten for others."""
    return rows.clear_dropped(_buffer(x, "pairs", len(rows.order_S), x.shape[1]))


def _buffer(x: torch.Tensor, use: str, *size: int) -> torch.Tensor:
    """Unwritten, for this call alone."""
    return reused(x, *size, owner=None, use=use)


def _products(b: Batch, given: torch.Tensor, maps: Maps, out: torch.Tensor) -> None:
    """Each group's rows through its expert's linear map."""
    if b.rows == len(b.sizes):  # a row each: fewer views, which take a good part of the time here
        for (weight, bias), own, made in zip(b.of(maps), given.unbind(), out.unbind(), strict=True):
            if bias is None:
                torch.mv(weight, own, out=made)
            else:
                torch.addmv(bias, weight, own, out=made)
        return
    for (weight, bias), own, made in b.zip(maps, given, out):
        if bias is None:
            _product(own, weight.mT, made)
        elif own.ndim == 3:
            torch.baddbmm(bias[:, None], own, weight.mT, out=made)
        else:
            torch.addmm(bias, own, weight.t(), out=made)


def _products_back(b: Batch, grad: torch.Tensor, weights: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Each group's gradient back through its expert's linear map."""
    for weight, own, made in b.zip(weights, grad, out):
        _product(own, weight, made)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    (torch.bmm if left.ndim == 3 else torch.mm)(left, right, out=out)


def _add_product(to: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    (to.baddbmm_ if left.ndim == 3 else to.addmm_)(left, right)


def _down_gradients(b: Batch, scaled: torch.Tensor, hidden: torch.Tensor, into: Gradients) -> None:
    for weight, left, right in b.zip(into.down, scaled, hidden):
        if weight is not None:
            _product(left.mT, right, weight)
    for bias, left in b.zip(into.down_bias, scaled):
        if bias is not None:
            torch.sum(left, -2, out=bias)


def _up_gradients(
    b: Batch,
    grad: torch.Tensor,
    scaled_x: torch.Tensor,
    gates: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
) -> None:
    for weight, left, right in b.zip(weights, grad, scaled_x):
        if weight is not None:
            _product(left.mT, right, weight)
    for bias, left, gate in b.zip(biases, grad, gates):
        if bias is not None:
            torch.matmul(left.mT, gate, out=bias[..., None])


def _clear_idle(rows: Rows, into: Gradients) -> None:
    """Gradients of experts without rows."""
    idle = [e for e, (lo, hi) in enumerate(pairwise(rows.bounds)) if lo == hi]
    for kind in into:
        for e in idle if len(kind) else ():
            if kind[e] is not None:
                kind[e].zero_()
