"""Shared by the CPU implementations of feed-forward experts: weights by expert, the plan on the
host, sums.

T rows, K experts a row, S = T * K pairs in the plan's order, D width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .reference import Stack

FEW = 1 << 16  # hidden values of a batch of groups that fit a core's cache with their operands
SPREAD = 1 << 25  # multiplications from which work is divided among cores (measured on 2 cores)
UNEVEN = 16  # the largest share may exceed the mean by 1 / UNEVEN
SMALL = 32  # rows of the largest group up to which groups are padded (measured on 2 cores)


class Weights(NamedTuple):
    """A stack, or a list of one tensor an expert, for each kind; empty if experts have none."""

    up: Stack  # (H, D) each
    down: Stack  # (D, H)
    gate: Stack  # (H, D)
    up_bias: Stack  # (H,)
    gate_bias: Stack  # (H,)
    down_bias: Stack  # (D,)

    def stacked(self) -> bool:
        return all(isinstance(w, torch.Tensor) or not len(w) for w in self)


class Gradients(NamedTuple):
    """Like `Weights`; empty for a kind without gradients, None for a tensor without one."""

    up: Any
    down: Any
    gate: Any
    up_bias: Any
    gate_bias: Any
    down_bias: Any

    def some(self) -> bool:
        return any(isinstance(k, torch.Tensor) or any(t is not None for t in k) for k in self)


class Batch(NamedTuple):
    """Consecutive groups that are processed together: one, or several with few rows."""

    first: int  # of the groups
    sizes: list[int]  # rows of each
    rows: int

    def of(self, by_expert: Sequence[Any]) -> Sequence[Any]:
        """The entries of these groups' experts."""
        return by_expert[self.first : self.first + len(self.sizes)]

    def zip(self, by_expert: Sequence[Any], *values: torch.Tensor) -> Iterable[tuple[Any, ...]]:
        """(its expert's entry, *its rows of each value) for each group."""
        if not by_expert:
            return ()
        if len(self.sizes) == 1:
            return ((by_expert[self.first], *values),)
        return zip(
            self.of(by_expert), *(v.split_with_sizes(self.sizes) for v in values), strict=True
        )


Maps = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


class HostPlan(NamedTuple):
    """The plan on the host: bounds of the experts' groups, and each pair's row.

    dense: every expert takes all rows in order, so nothing is gathered.
    """

    bounds: list[int]
    experts: list[int]  # those with rows: a group each, in the plan's order
    batches: list[Batch]
    shares: list[list[int]]  # indices of the batches that each core takes
    largest: int  # most rows of a group
    longest: int  # most rows of a batch
    tokens_S: torch.Tensor
    order_S: torch.Tensor
    inverse_TK: torch.Tensor
    dense: bool

    @classmethod
    def of(
        cls,
        order: torch.Tensor,
        offsets: torch.Tensor,
        inverse: torch.Tensor,
        k: int,
        hidden: int,
        width: int,
        dense: bool,
    ) -> HostPlan:
        bounds = offsets.tolist()
        sizes = [hi - lo for lo, hi in pairwise(bounds)]
        experts = [e for e, n in enumerate(sizes) if n]
        batches = _batches([n for n in sizes if n], hidden)
        shares = divided([b.rows for b in batches], hidden * width)
        return cls(
            bounds, experts, batches, shares, max(sizes, default=0),
            max((b.rows for b in batches), default=0), order // k, order, inverse.view(-1, k), dense,
        )  # fmt: skip

    def fits_padding(self) -> bool:
        """Whether groups are small and, padded to the largest, have at most twice the rows."""
        few = (len(self.bounds) - 1) * self.largest <= 2 * self.bounds[-1]
        return not self.dense and 0 < self.largest <= SMALL and few

    def clear_dropped(self, of_S: torch.Tensor) -> torch.Tensor:
        """Set the values of dropped pairs to zero, in place."""
        if self.bounds[-1] < of_S.shape[0]:
            of_S[self.bounds[-1] :] = 0
        return of_S

    def parts(self, of_S: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each batch's pairs, as views; one split costs a fifth of as many slices."""
        if len(self.batches) == 1 and self.bounds[-1] == of_S.shape[0]:
            return (of_S,)
        kept = of_S[: self.bounds[-1]]
        return kept.split_with_sizes([b.rows for b in self.batches]) if self.batches else ()

    def each(self, weights: Stack) -> Sequence[torch.Tensor]:
        """The tensor of each group's expert; empty if experts have none of this kind."""
        if not isinstance(weights, torch.Tensor):
            return [weights[e] for e in self.experts] if weights else ()
        if weights.shape[0] <= 4 * len(self.experts):
            every = weights.unbind()
            return [every[e] for e in self.experts]
        return [weights[e] for e in self.experts]

    def maps(self, weights: Stack, biases: Stack) -> Maps:
        """(weight, bias or None) of each group's expert; empty if experts have no such map."""
        own = self.each(weights)
        added: Sequence[Any] = self.each(biases)
        return list(zip(own, added or [None] * len(own), strict=True))

    def gather(self, x_TD: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rows of a batch's tokens: in `out`, or x itself if these are all rows in order."""
        if x_TD.shape[0] == 1:
            return x_TD.expand(tokens.shape[0], -1)
        if self.dense and tokens.shape[0] == x_TD.shape[0]:
            return x_TD
        return torch.index_select(x_TD, 0, tokens, out=out)


def _batches(sizes: list[int], hidden: int) -> list[Batch]:
    """Batches of neighbouring groups, as long as their hidden values are few."""
    batches: list[Batch] = []
    for i, n in enumerate(sizes):
        if batches and (batches[-1].rows + n) * hidden <= FEW:
            first, together, rows = batches[-1]
            batches[-1] = Batch(first, [*together, n], rows + n)
        else:
            batches.append(Batch(i, [n], n))
    return batches


def divided(rows: list[int], products: int) -> list[list[int]]:
    """Indices of the batches of each core, or one share of all if shares would be small or uneven.

    Greedy: the largest batch first, to the core with the fewest rows. rows: of each batch. products:
    multiplications of one row.
    """
    count, every = torch.get_num_threads(), list(range(len(rows)))
    if count == 1 or sum(rows) * products < SPREAD:
        return [every]
    shares: list[list[int]] = [[] for _ in range(count)]
    taken = [0] * count
    for i in sorted(every, key=rows.__getitem__, reverse=True):
        least = taken.index(min(taken))
        shares[least].append(i)
        taken[least] += rows[i]
    fits_padding = max(taken) * count * UNEVEN <= sum(rows) * (UNEVEN + 1)
    return [sorted(s) for s in shares] if fits_padding else [every]


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n,) inner products of rows, in fp32 or more."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(a, b)
    return (a * b).sum(-1, dtype=torch.float32)


def combine(y_SD: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """``sum_k gates[t, k] * y[inverse[t, k]]``, in the order of k, accumulated in fp32 or more."""
    wide = y_SD.dtype in (torch.float32, torch.float64) and y_SD.shape[0] > 0
    if wide and inverse_TK.shape[0] == 1:
        return torch.mm(gates_TK.to(y_SD.dtype), y_SD.index_select(0, inverse_TK[0]))
    if wide:
        weights = gates_TK.to(y_SD.dtype)
        offsets = torch.arange(0, inverse_TK.numel(), inverse_TK.shape[1])
        flat = inverse_TK.reshape(-1)
        bag = torch.ops.aten._embedding_bag_forward_only
        return bag(y_SD, flat, offsets, False, 0, False, weights.reshape(-1))[0]
    total = y_SD.new_zeros(len(inverse_TK), y_SD.shape[1], dtype=torch.float32)
    for k in range(inverse_TK.shape[1]):
        total.addcmul_(y_SD.index_select(0, inverse_TK[:, k]).float(), gates_TK[:, k, None])
    return total.to(y_SD.dtype)
