"""The call that replaces a feed-forward region: runs the dense one, or each row's experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ...analysis.feedforward import FeedForward, Linear
from ...ir.program import Code
from ...kernels import cost_model
from ...kernels.autocast import autocasts
from ...kernels.cost_model import Execution
from ...kernels.ffn.low_precision import LowPrecision, linear
from ...kernels.ffn.op import ffn_dense, ffn_experts
from ...kernels.triton import runs_on
from ...routing.dispatch import Dispatch, RowGates, Watch
from .activation_match import FusedFFN, find_fused_form
from .low_precision_call import holds_low_precision, run_sorted, without_gradient

Weights = list[Any]  # one expert's tensors, matrices perhaps in low precision


@dataclass(frozen=True)
class Body:
    """A feed-forward region as a function of rows (..., D) and its weights."""

    ups: tuple[Linear, ...]
    middle: Code
    extra: tuple[int, ...]
    down: Linear

    def __call__(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        inner = self.hidden(x, weights)
        return linear(inner, matrix(self.down, weights), bias(self.down, weights))

    def hidden(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """(..., H), the last product's input."""
        products = [linear(x, matrix(p, weights), bias(p, weights)) for p in self.ups]
        return self.middle.call(*products, *(weights[i] for i in self.extra))


def matrix(product: Linear, weights: Weights) -> Any:
    """A view of the product's weight as (out, in), as which those in low precision are stored."""
    weight = weights[product.weight]
    if isinstance(weight, LowPrecision):
        return weight
    if product.pointwise:
        return weight.flatten(1)
    return weight.t() if product.transposed else weight


def bias(product: Linear, weights: Weights) -> torch.Tensor | None:
    return None if product.bias is None else weights[product.bias]


class FeedForwardCall:
    """The target of a region's node: call(x, gates, dense, experts, shared) -> the region's output.

    x: rows (..., D), or a map (B, D, H, W).
    gates: RowGates; None or a Watch runs the dense region.
    dense: the frozen region's tensors.
    experts: for each of these, the active experts' tensors, or None for a constant that all share.
    shared: of a region with a shared expert, its tensors, or None as above, then its gate (D,) or
        None.

    A row that no expert takes gets zero, or the bias that experts do not have.
    """

    __module__, __qualname__, __name__ = __name__, "FeedForwardCall", "feed_forward_call"
    form: FusedFFN | None = None  # set by lowering: the fused form to run
    requested: Execution | None = None  # of the fused op; None for the cheaper one

    def __init__(
        self, region: FeedForward, widths: tuple[int, ...], dims: int, bias_once: bool = False
    ) -> None:
        """widths: of the products of x. dims: the output's number of dimensions, which is smaller
        than x's if the rows were merged. bias_once: experts have no bias of the last product, which
        is added to their sum."""
        self.dense = self.body = Body(region.ups, region.middle, region.extra, region.down)
        self.channels, self.widths, self.dims = region.channels, widths, dims
        self.bias_once = region.down.bias if bias_once else None  # its index
        if bias_once:
            self.body = replace(self.dense, down=replace(region.down, bias=None))

    def __deepcopy__(self, memo: dict) -> FeedForwardCall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def lowered(self, requested: Execution | None) -> FeedForwardCall:
        """A copy that runs the fused op, if there is one for this region."""
        call = copy.copy(self)
        call.form, call.requested = find_fused_form(self.body.middle, self.widths), requested
        return call

    def __call__(
        self, x: torch.Tensor, gates: RowGates | Watch | None, dense: tuple, experts: tuple,
        shared: tuple = (),
    ) -> torch.Tensor:  # fmt: skip
        rows = x.movedim(self.channels, -1)
        if not isinstance(gates, RowGates):
            if gates is not None:
                gates.show(rows, self.dense, dense)
            y = self.dense(rows, list(dense))
        else:
            weights = self.by_expert(gates.base, dense, experts)
            flat = rows.reshape(-1, rows.shape[-1])
            y = self.run(flat, gates, tuple(rows.shape[:-1]), weights).view(rows.shape)
            y = y if self.bias_once is None else y + dense[self.bias_once]
            y = y + self.of_shared(rows, dense, shared) if shared else y
        return y.movedim(-1, self.channels) if y.ndim == self.dims else y.flatten(0, -2)

    def of_shared(self, rows: torch.Tensor, dense: tuple, shared: tuple) -> torch.Tensor:
        """What the shared expert gives rows (..., D)."""
        *own, gate = shared
        y = self.dense(rows, [d if o is None else o for d, o in zip(dense, own, strict=True)])
        return y if gate is None else linear(rows, gate.unsqueeze(0), None).sigmoid() * y

    def by_expert(self, base: bool, dense: tuple, experts: tuple) -> list[Weights]:
        """The tensors of each expert of a dispatch, the dense ones first if `base`."""
        count = len(next(own for own in experts if own is not None))
        both = list(zip(dense, experts, strict=True))
        copies = [[d if own is None else own[e] for d, own in both] for e in range(count)]
        return [list(dense), *copies] if base else copies

    def run(
        self, x_TD: torch.Tensor, gates: RowGates, lead: tuple[int, ...], weights: list[Weights]
    ) -> torch.Tensor:
        """(T, D) output of each row's experts. lead: the rows' dimensions before flattening."""
        gates_TE, dispatch = gates.over(lead)
        device = x_TD.device.type
        apart = self._weighted if torch.compiler.is_compiling() else self._looped
        if holds_low_precision(weights):
            sorts = device == "cpu" and not torch.compiler.is_compiling()
            way = partial(run_sorted, self.body, matrix) if sorts else apart
            return without_gradient(
                lambda x, gates: way(x, gates, dispatch, weights), x_TD, gates_TE
            )
        fused = self.form is not None and (device == "cpu" or runs_on(x_TD))
        of_kind = self._fused if fused and not autocasts(device) else apart
        return of_kind(x_TD, gates_TE, dispatch, weights)

    def _looped(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, dispatch: Dispatch,
        weights: list[Weights],
    ) -> torch.Tensor:  # fmt: skip
        """Run every expert on its rows and add the results in the experts' order, in the dtype of
        the region's output."""
        ends = dispatch.plan.offsets.tolist()
        rows = dispatch.plan.order // dispatch.experts_TK.shape[1]
        y_TD = torch.zeros_like(x_TD, dtype=self.body(x_TD[:0], weights[0]).dtype)
        for e, own in enumerate(weights):
            mine = rows[ends[e] : ends[e + 1]]
            if len(mine):
                gates = gates_TE[mine, e].unsqueeze(1).to(y_TD.dtype)
                y_TD = y_TD.index_add(0, mine, self.body(x_TD[mine], own) * gates)
        return y_TD

    def _weighted(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, dispatch: Dispatch,
        weights: list[Weights],
    ) -> torch.Tensor:  # fmt: skip
        """As `_looped`, with every expert on all rows: compiled code does not read which rows an
        expert has."""
        y_TD = torch.zeros_like(x_TD, dtype=self.body(x_TD[:0], weights[0]).dtype)
        for e, own in enumerate(weights):
            gates = gates_TE[:, e].unsqueeze(1)
            made = self.body(x_TD, own) * gates.to(y_TD.dtype)
            y_TD = y_TD + torch.where(gates == 0, 0, made)  # a row of another may overflow here
        return y_TD

    def _fused(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, dispatch: Dispatch,
        weights: list[Weights],
    ) -> torch.Tensor:  # fmt: skip
        assert self.form is not None
        parts = self.parts(weights)
        given = (*parts, self.form.activation)
        if dispatch.every or self._way(x_TD, dispatch, parts[0]) == "dense":
            return ffn_dense(x_TD, gates_TE, *given)
        gates_TK = gates_TE.gather(1, dispatch.experts_TK.clamp_min(0))
        return ffn_experts(x_TD, gates_TK, dispatch.experts_TK, dispatch.plan, *given)

    def _way(self, x_TD: torch.Tensor, dispatch: Dispatch, up: list[torch.Tensor]) -> Execution:
        if self.requested is not None:
            return self.requested
        # on a GPU and in compiled code the host does not know which pairs are dropped
        if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
            return "grouped"
        assert self.form is not None
        (rows, width), pairs = x_TD.shape, int(dispatch.plan.offsets[-1])
        if pairs == 0:
            return "grouped"
        taken, products, hidden = pairs / rows, 3 if self.form.gate else 2, up[0].shape[0]
        return cost_model.best(
            cost_model.ffn(cost_model.CPU, rows, width, hidden, len(up), taken, products)
        )

    def parts(self, weights: list[Weights]) -> tuple[Any, Any, Any, Any, Any, Any]:
        """(up, down, gate, up_bias, gate_bias, down_bias) of the fused form: lists of one tensor an
        expert, or None."""
        assert self.form is not None
        up, up_bias = self._of(self.form.up, weights)
        gate, gate_bias = self._of(self.form.gate, weights) if self.form.gate else (None, None)
        down = [matrix(self.body.down, w) for w in weights]
        return up, down, gate, up_bias, gate_bias, _biases(self.body.down, weights)

    def _of(self, place: tuple[int, int | None], weights: list[Weights]) -> tuple[Any, Any]:
        """(matrices, biases) of a product, or of a half of it, one for each expert."""
        number, half = place
        product = self.body.ups[number]
        matrices, biases = [matrix(product, w) for w in weights], _biases(product, weights)
        if half is None:
            return matrices, biases
        return [m.chunk(2)[half] for m in matrices], biases and [b.chunk(2)[half] for b in biases]


def _biases(product: Linear, weights: list[Weights]) -> list[torch.Tensor] | None:
    return None if product.bias is None else [w[product.bias] for w in weights]
