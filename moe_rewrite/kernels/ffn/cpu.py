"""Feed-forward experts on the CPU: products of each expert's rows, sorted once.

T rows, K experts a row, S = T * K pairs in the plan's order, D width, H hidden width. All batches
of groups share the same buffers, so that intermediate values stay in the cache. Gates multiply
arrays of width D, never ones of width H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..buffer_reuse import reused
from ..cpu_threads import spread
from . import cpu_padded
from .activations import activate, activation_backward
from .cpu_plan import Batch, Gradients, HostPlan, Maps, Weights, combine, dot


def forward(
    x: torch.Tensor, gates: torch.Tensor, rows: HostPlan, w: Weights, activation: str, save: bool,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y (T, D), pre (1 or 2, S, H): the products of up and, if there is one, of the gate). owner:
    the weight that owns pre's memory (see buffer_reuse.py)."""
    if w.stacked() and rows.fits_padding():
        return cpu_padded.forward(x, gates, rows, w, activation, save, owner)
    ups, gatings, downs = (
        rows.maps(*k) for k in ((w.up, w.up_bias), (w.gate, w.gate_bias), (w.down, w.down_bias))
    )
    kinds, pairs, hidden = 2 if len(w.gate) else 1, rows.order_S.shape[0], w.up[0].shape[0]
    pre = x.new_empty(kinds, 0, hidden)
    if save:
        pre = reused(x, kinds, pairs, hidden, owner=owner, use="products")
        rows.clear_dropped(pre.transpose(0, 1))
        saved = rows.parts(pre[0]), rows.parts(pre[-1])
    y = _pairs(rows, x)
    tokens_of, made_of = rows.parts(rows.tokens_S), rows.parts(y)
    shares = len(rows.shares)
    taken_of = _buffer(x, "rows", shares, rows.longest, x.shape[1])
    buffers_of = _buffer(x, "hidden", shares, 2, rows.longest, hidden)

    def work(share: int) -> None:
        for i in rows.shares[share]:
            b = rows.batches[i]
            given = rows.gather(x, tokens_of[i], taken_of[share, : b.rows])
            lifted, act = buffers_of[share, :, : b.rows]
            gating = act
            if save:
                lifted, gating = saved[0][i], saved[1][i]
            _products(b, given, ups, lifted)
            if gatings:
                _products(b, given, gatings, gating)
                activate(activation, gating, act).mul_(lifted)
            else:
                activate(activation, lifted, act)
            _products(b, act, downs, made_of[i])

    spread(work, shares)
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
    """(dx, dgates), None where not needed; gradients of the weights are written into `into`.

    Products are computed without the gates: ``dhidden = dy down``, ``dgate = <dhidden, hidden>``;
    the gates multiply rows of dy, x and dx instead of rows of width H.
    """
    if w.stacked() and rows.fits_padding():
        return cpu_padded.backward(dy, x, gates, pre, rows, w, activation, need_x, need_gates, into)
    up, down, gate, _, _, down_bias = map(rows.each, w)
    grads, trained = Gradients(*map(rows.each, into)), into.some()
    weights_S1 = gates.reshape(-1, 1).index_select(0, rows.order_S).to(x.dtype)
    dgates_S = x.new_zeros(gates.numel(), dtype=gates.dtype)
    dx = _pairs(rows, x) if need_x else None
    owns = rows.parts(dx) if dx is not None else [None] * len(rows.batches)
    shares = len(rows.shares)
    rows_of = _buffer(x, "rows", shares, 2, rows.longest, x.shape[1])
    buffers_of = _buffer(x, "hidden", shares, 3, rows.longest, pre.shape[-1])
    of_pairs = list(zip(
        rows.batches, owns,
        *map(rows.parts, (rows.tokens_S, weights_S1, pre[0], pre[-1], dgates_S)), strict=True,
    ))  # fmt: skip

    def work(share: int) -> None:
        for i in rows.shares[share]:
            b, own, tokens, weights, lifted, gating, dgates = of_pairs[i]
            taken, scaled = rows_of[share, :, : b.rows]
            dhidden, act, spare = buffers_of[share, :, : b.rows]
            grad = rows.gather(dy, tokens, taken)
            _products_back(b, grad, down, dhidden)
            activate(activation, gating, act)
            hidden = torch.mul(act, lifted, out=spare) if gate else act
            if need_gates:
                dgates.copy_(dot(dhidden, hidden))
                for bias, part, values in b.zip(down_bias, dgates, grad):
                    part += torch.mv(values, bias)
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
                torch.mul(rows.gather(x, tokens, taken), weights, out=scaled)
                _up_gradients(b, dup, scaled, weights, grads.up, grads.up_bias)
                if dgating is not None:
                    _up_gradients(b, dgating, scaled, weights, grads.gate, grads.gate_bias)
            if own is not None:
                _products_back(b, dup, up, own)
                if dgating is not None:
                    for weight, part, left in b.zip(gate, own, dgating):
                        part.addmm_(left, weight)

    spread(work, shares)
    _clear_idle(rows, into)
    flat = rows.inverse_TK.flatten()
    return (
        None if dx is None else combine(dx, rows.inverse_TK, gates),
        dgates_S.index_select(0, flat).view_as(gates) if need_gates else None,
    )


def _pairs(rows: HostPlan, x: torch.Tensor) -> torch.Tensor:
    """(S, D), zero for dropped pairs and uninitialised for the others."""
    return rows.clear_dropped(_buffer(x, "pairs", len(rows.order_S), x.shape[1]))


def _buffer(x: torch.Tensor, use: str, *size: int) -> torch.Tensor:
    """An uninitialised buffer for this call only."""
    return reused(x, *size, owner=None, use=use)


def _products(b: Batch, given: torch.Tensor, maps: Maps, out: torch.Tensor) -> None:
    """Each group's rows through its expert's linear map."""
    if b.rows == len(b.sizes):  # one row a group: avoid views, which take much of the time here
        for (weight, bias), own, made in zip(b.of(maps), given.unbind(), out.unbind(), strict=True):
            if bias is None:
                torch.mv(weight, own, out=made)
            else:
                torch.addmv(bias, weight, own, out=made)
        return
    for (weight, bias), own, made in b.zip(maps, given, out):
        if bias is None:
            torch.mm(own, weight.t(), out=made)
        else:
            torch.addmm(bias, own, weight.t(), out=made)


def _products_back(
    b: Batch, grad: torch.Tensor, weights: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Each group's gradient back through its expert's linear map."""
    for weight, own, made in b.zip(weights, grad, out):
        torch.mm(own, weight, out=made)


def _down_gradients(b: Batch, scaled: torch.Tensor, hidden: torch.Tensor, into: Gradients) -> None:
    for weight, left, right in b.zip(into.down, scaled, hidden):
        if weight is not None:
            torch.mm(left.t(), right, out=weight)
    for bias, left in b.zip(into.down_bias, scaled):
        if bias is not None:
            torch.sum(left, 0, out=bias)


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
            torch.mm(left.t(), right, out=weight)
    for bias, left, gate in b.zip(biases, grad, gates):
        if bias is not None:
            torch.mv(left.t(), gate[:, 0], out=bias)


def _clear_idle(rows: HostPlan, into: Gradients) -> None:
    """Set the gradients of experts without rows to zero."""
    idle = set(range(len(rows.bounds) - 1)) - set(rows.experts)
    for kind in into:
        for e in idle if len(kind) else ():
            if kind[e] is not None:
                kind[e].zero_()
