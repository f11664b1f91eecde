"""What runs in the place of a feed-forward region: the dense one, or each row's experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..analysis.feedforward import FeedForward, Linear
from ..program import Code
from ..routing.dispatch import Dispatch, RowGates


@dataclass(frozen=True)
class Body:
    """A feed-forward region as a function of rows (..., D) and one list of weights."""

    ups: tuple[Linear, ...]
    middle: Code
    extra: tuple[int, ...]
    down: Linear

    def __call__(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        hidden = [_linear(x, up, weights) for up in self.ups]
        return _linear(
            self.middle.call(*hidden, *(weights[i] for i in self.extra)), self.down, weights
        )


def matrix(linear: Linear, weights: list[torch.Tensor]) -> torch.Tensor:
    """A view of the product's weight as (out, in)."""
    weight = weights[linear.weight]
    if linear.pointwise:
        return weight.flatten(1)
    return weight.t() if linear.transposed else weight


def _linear(x: torch.Tensor, linear: Linear, weights: list[torch.Tensor]) -> torch.Tensor:
    return F.linear(
        x, matrix(linear, weights), None if linear.bias is None else weights[linear.bias]
    )


class FeedForwardCall:
    """The target of a region's node: call(x, gates, dense, experts) -> the region's output.

    x: rows (..., D), or a map (B, D, H, W). dense: the frozen region's tensors. experts: for each
    of these, a list with one of every active expert, or None for a constant, which all share.
    Without gates the dense region runs; a row that no expert takes gets zero.
    """

    __module__, __qualname__, __name__ = __name__, "FeedForwardCall", "feed_forward_call"

    def __init__(self, region: FeedForward, dims: int) -> None:
        """dims: dimensions of the output, which may have the rows merged into one."""
        self.body = Body(region.ups, region.middle, region.extra, region.down)
        self.channels, self.dims = region.channels, dims

    def __deepcopy__(self, memo: dict) -> FeedForwardCall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, x: torch.Tensor, gates: RowGates | None, dense: tuple, experts: tuple
    ) -> torch.Tensor:
        rows = x.movedim(self.channels, -1)
        if gates is None:
            y = self.body(rows, list(dense))
        else:
            gates_TE, dispatch = gates.over(tuple(rows.shape[:-1]))
            weights = weights_by_expert(gates.base, dense, experts)
            y = self._routed(rows.reshape(-1, rows.shape[-1]), gates_TE, dispatch, weights)
            y = y.unflatten(0, rows.shape[:-1])
        return y.movedim(-1, self.channels) if y.ndim == self.dims else y.flatten(0, -2)

    def _routed(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, dispatch: Dispatch,
        weights: list[list[torch.Tensor]],
    ) -> torch.Tensor:  # fmt: skip
        """Every expert on its rows, added up in the experts' order."""
        ends = dispatch.offsets.tolist()
        y_TD = x_TD.new_zeros(x_TD.shape)
        for e, own in enumerate(weights):
            pairs = slice(ends[e], ends[e + 1])
            if pairs.start < pairs.stop:
                rows = dispatch.rows_N[pairs]
                made = self.body(x_TD[rows], own)
                gates = gates_TE[rows, e].unsqueeze(1).to(made.dtype)
                y_TD = y_TD.index_add(0, rows, made * gates)
        return y_TD


def weights_by_expert(base: bool, dense: tuple, experts: tuple) -> list[list[Any]]:
    """One list of the region's tensors for each expert of a dispatch."""
    count = len(next(own for own in experts if own is not None))
    both = list(zip(dense, experts, strict=True))
    copies = [[d if own is None else own[e] for d, own in both] for e in range(count)]
    return [list(dense), *copies] if base else copies
