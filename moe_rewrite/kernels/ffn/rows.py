"""What the CPU's forms of feed-forward experts share: weights by expert, the plan at hand, sums.

T rows, K experts a row takes, S = T * K pairs in the plan's order, groups that are multiplied at
once filled up to one size; D width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..triton import runs_on
from .reference import Stack

FEW = 1 << 16  # values that a core's cache holds beside what they are made of
SMALL = 64  # rows of a group from which a product alone fills the cores (measured on 2)
EACH = 1 << 18  # hidden values of a group up to which one core is to take a group
ROOM = 16  # groups are filled up by at most one in so many rows


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

    def owner(self) -> torch.Tensor:
        """The tensor that other large results of the call go with (see memory.py)."""
        return self.up if isinstance(self.up, torch.Tensor) else self.up[0]


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


class Part(NamedTuple):
    """What one product takes: an expert's group, or those of neighbours, filled up to one size."""

    first: int  # of the experts
    experts: int
    rows: int  # of each


class Batch(NamedTuple):
    """Parts that are taken together: one, or several of few rows, next to each other."""

    first: int  # of the parts
    experts: int  # of a part, one where there are several parts
    sizes: list[int]  # rows of each
    rows: int

    def of(self, by_part: Sequence[Any]) -> Sequence[Any]:
        """What these parts have; empty where experts have no such thing."""
        return by_part[self.first : self.first + len(self.sizes)]

    def zip(self, by_part: Sequence[Any], *values: torch.Tensor) -> Iterable[tuple[Any, ...]]:
        """For each part what it has, and its rows: (rows, ...), or (experts, rows, ...)."""
        if not by_part:
            return ()
        if self.experts > 1:
            values = tuple(v.unflatten(0, (self.experts, -1)) for v in values)
        if len(self.sizes) == 1:
            return ((by_part[self.first], *values),)
        return zip(
            self.of(by_part), *(v.split_with_sizes(self.sizes) for v in values), strict=True
        )


Maps = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


class Rows(NamedTuple):
    """The plan at hand: bounds of the experts' groups on the host, and each pair's row.

    filling: places in S that repeat another pair, to fill a group up. dense: every expert takes all
    rows in their order, so that nothing is gathered.
    """

    bounds: list[int]  # before groups are filled up
    parts: list[Part]
    batches: list[Batch]
    largest: int  # rows of a group
    longest: int  # rows of a batch
    tokens_S: torch.Tensor
    order_S: torch.Tensor
    inverse_TK: torch.Tensor
    filling: torch.Tensor | None
    dense: bool

    @classmethod
    def of(
        cls,
        order: torch.Tensor,
        offsets: torch.Tensor,
        inverse: torch.Tensor,
        k: int,
        hidden: int,
        dense: bool,
        stacked: bool,
    ) -> Rows:
        bounds = offsets.tolist()
        sizes = [hi - lo for lo, hi in pairwise(bounds)]
        at_once = torch.get_num_threads() if stacked and not dense else 1
        parts = _parts(sizes, at_once, hidden)
        batches, filling = _batches(parts, hidden), None
        if sum(p.experts * p.rows for p in parts) > bounds[-1]:
            order, inverse, filling = _filled(order, inverse, bounds, parts)
        return cls(
            bounds, parts, batches, max(sizes, default=0), max((b.rows for b in batches), default=0),
            order // k, order, inverse.view(-1, k), filling, dense,
        )  # fmt: skip

    def kept(self) -> int:
        """Places in S before those of dropped pairs."""
        return self.bounds[-1] + (0 if self.filling is None else len(self.filling))

    def even(self) -> bool:
        """Whether small groups filled up to the largest's size are fewer than twice the rows."""
        few = (len(self.bounds) - 1) * self.largest <= 2 * self.bounds[-1]
        return not self.dense and 0 < self.largest <= SMALL and few

    def clear_dropped(self, of_S: torch.Tensor) -> torch.Tensor:
        """The values given, those of dropped pairs zero."""
        if self.kept() < of_S.shape[0]:
            of_S[self.kept() :] = 0
        return of_S

    def split(self, of_S: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each batch's pairs, as views: made at once they cost a fifth of as many slices."""
        if len(self.batches) == 1 and self.kept() == of_S.shape[0]:
            return (of_S,)
        kept = of_S[: self.kept()]
        return kept.split_with_sizes([b.rows for b in self.batches]) if self.batches else ()

    def each(self, weights: Stack) -> Sequence[torch.Tensor]:
        """The tensor of each part's expert, a stack where it has several; none where the experts
        have no such tensor."""
        if not isinstance(weights, torch.Tensor):
            return [weights[p.first] for p in self.parts] if weights else ()
        single = weights.unbind() if weights.shape[0] <= 4 * len(self.parts) else weights
        return [
            single[p.first] if p.experts == 1 else weights[p.first : p.first + p.experts]
            for p in self.parts
        ]

    def maps(self, weights: Stack, biases: Stack) -> Maps:
        """The linear map of each part; none where the experts have none."""
        own = self.each(weights)
        added: Sequence[Any] = self.each(biases)
        return list(zip(own, added or [None] * len(own), strict=True))

    def gather(self, x_TD: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rows of a batch's tokens: in `out`, or as they are where they are all in order."""
        if x_TD.shape[0] == 1:
            return x_TD.expand(tokens.shape[0], -1)
        if self.dense and tokens.shape[0] == x_TD.shape[0]:
            return x_TD
        return torch.index_select(x_TD, 0, tokens, out=out)


def saved_rows(x: torch.Tensor, pairs: int, up: Any) -> int:
    """Rows of what is saved for a backward pass, a size that does not depend on the plan."""
    room = isinstance(up, torch.Tensor) and not runs_on(x)
    return pairs + pairs // ROOM if room else pairs


def _parts(sizes: list[int], at_once: int, hidden: int) -> list[Part]:
    """Groups of as many neighbours as there are cores are one product, an expert a core, which
    takes less than a product at a time that is spread over the cores; of groups that differ too
    much, of small ones and of those too large for a core's cache each is a product of its own."""
    parts: list[Part] = []
    e = 0
    while e < len(sizes):
        near = sizes[e : e + at_once]
        filled = len(near) * max(near)
        several = len(near) == at_once > 1 and min(near) > SMALL and max(near) * hidden <= EACH
        if several and filled <= sum(near) + sum(near) // ROOM:
            parts.append(Part(e, len(near), max(near)))
            e += len(near)
            continue
        if sizes[e]:
            parts.append(Part(e, 1, sizes[e]))
        e += 1
    return parts


def _filled(
    order: torch.Tensor, inverse: torch.Tensor, bounds: list[int], parts: list[Part]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order, inverse, filling) of groups of the parts' sizes, which repeat their last pair."""
    ends = torch.tensor(bounds)
    first, sizes = ends[:-1], ends.diff()
    wanted = sizes.clone()
    for p in parts:
        wanted[p.first : p.first + p.experts] = p.rows
    starts = wanted.cumsum(0) - wanted
    within = torch.arange(int(wanted.sum())) - starts.repeat_interleave(wanted)
    own = sizes.repeat_interleave(wanted)
    pairs = first.repeat_interleave(wanted) + torch.minimum(within, own - 1)
    place = torch.arange(len(order))
    place[: bounds[-1]] += (starts - first).repeat_interleave(sizes)
    place[bounds[-1] :] += len(within) - bounds[-1]
    filling = (within >= own).nonzero()[:, 0]
    return torch.cat([order[pairs], order[bounds[-1] :]]), place[inverse], filling


def _batches(parts: list[Part], hidden: int) -> list[Batch]:
    """Neighbours together as long as their hidden values are few."""
    batches: list[Batch] = []
    for i, (_, experts, rows) in enumerate(parts):
        last = batches[-1] if batches else None
        if last and last.experts == experts == 1 and (last.rows + rows) * hidden <= FEW:
            batches[-1] = Batch(last.first, 1, [*last.sizes, rows], last.rows + rows)
        else:
            batches.append(Batch(i, experts, [experts * rows], experts * rows))
    return batches


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
