"""What the CPU's forms of feed-forward experts share: weights by expert, the plan at hand, sums.

T rows, K experts a row takes, S = T * K pairs in the plan's order, D width, H hidden width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .reference import Stack

SMALL = 64  # rows of a group from which a product alone fills the cores (measured on 2)


class Weights(NamedTuple):
    """A stack or a list per kind; empty where the experts have no such tensor."""

    up: Stack  # (H, D) each
    down: Stack  # (D, H)
    gate: Stack  # (H, D)
    up_bias: Stack  # (H,)
    gate_bias: Stack  # (H,)
    down_bias: Stack  # (D,)

    def stacked(self) -> bool:
        return all(isinstance(w, torch.Tensor) or not len(w) for w in self)


class Gradients(NamedTuple):
    """As `Weights`; empty for a kind without gradients, None in a list for a tensor without."""

    up: Any
    down: Any
    gate: Any
    up_bias: Any
    gate_bias: Any
    down_bias: Any

    def some(self) -> bool:
        return any(isinstance(k, torch.Tensor) or any(t is not None for t in k) for k in self)


class Rows(NamedTuple):
    """The plan at hand: bounds of the experts' groups on the host, and each pair's row.

    dense: every expert takes all rows in their order, so that nothing is gathered.
    """

    bounds: list[int]
    groups: list[tuple[int, int, int]]  # (expert, first, end) of the experts that have rows
    largest: int
    tokens_S: torch.Tensor
    order_S: torch.Tensor
    inverse_TK: torch.Tensor
    dense: bool

    @classmethod
    def of(
        cls, order: torch.Tensor, offsets: torch.Tensor, inverse: torch.Tensor, k: int, dense: bool
    ) -> Rows:
        bounds = offsets.tolist()
        groups = [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]
        largest = max((hi - lo for _, lo, hi in groups), default=0)
        return cls(bounds, groups, largest, order // k, order, inverse.view(-1, k), dense)

    def even(self) -> bool:
        """Whether small groups filled up to the largest's size are fewer than twice the rows."""
        few = (len(self.bounds) - 1) * self.largest <= 2 * self.bounds[-1]
        return not self.dense and 0 < self.largest <= SMALL and few

    def gather(self, x_TD: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        if self.dense or len(x_TD) == 1:
            return x_TD
        return x_TD.index_select(0, self.tokens_S[lo:hi])


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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
