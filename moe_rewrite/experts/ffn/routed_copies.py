"""Copies of a feed-forward beside the rows of the region's own router, and a shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...ir.sites import FeedForwardSite, Part
from ...routing.router import without
from ..copies import CopiedParameters
from .shared import HALF, Kind, SharedExpert


@dataclass(frozen=True)
class Upcycling:
    """How experts begin; see `FFNExperts`.

    total: the sum of a row's gates that outputs are scaled for.
    shared: the form of a shared expert, None without.
    """

    granularity: int = 1
    reinit: float = 0.0
    total: float = 1.0
    shared: Kind | None = None

    @classmethod
    def of(cls, recipe: Any) -> Upcycling:
        """Of a recipe whose layers have routers. With equal logits a softmax over all experts gives
        the k taken ``k / E``, and k sigmoids give ``k / 2``."""
        experts, router = recipe.experts, recipe.router
        k = min(router.top_k or recipe.num_experts, recipe.num_experts)
        sigmoid = experts.score == "sigmoid"
        summed = 1.0 if router.gate == "selected" else k / (2 if sigmoid else recipe.num_experts)
        total = summed if experts.scaled else 1.0
        return cls(experts.granularity, experts.reinit, total, experts.shared)

    def factor(self, site: FeedForwardSite, part: Part) -> float:
        """What an expert's part is multiplied by: the k experts of ``k / granularity`` copies are to
        add up to the dense output where their gates add up to `total`, or to half of it beside a
        shared expert."""
        if part.name not in site.down:
            return 1.0
        whole = 1.0 if self.shared is None else HALF
        return (self.granularity if part.kept else 1) * whole / self.total

    def redraw(self, parts: Sequence[tuple[Part, torch.Tensor, torch.Tensor]]) -> None:
        """Draw some hidden units' weights anew, in place. parts: with an expert's tensor and the
        dense one; biases stay."""
        of_hidden = [(p.kept[0], own, dense) for p, own, dense in parts if p.kept and own.ndim > 1]
        (_, hidden), like, _ = of_hidden[0]
        units = torch.randperm(hidden, device=like.device)[: round(self.reinit * hidden)]
        for (dim, _), own, dense in of_hidden:
            new = own.index_select(dim, units)
            new.normal_(float(dense.float().mean()), float(dense.float().std()))
            own.index_copy_(dim, units, new)


class RoutedCopies(CopiedParameters):
    """rows[e]: (D + biased,), expert e's row of the region's router: random, or all rows would go to
    the first experts. A graph takes it in the dtype of the dense weights, as models with such routers
    have it. Rows stay trainable when experts are frozen. Experts of one copy begin with one row.

    before[e]: the rows just before expert e was added.
    shared: what every row has in addition, where an expert is on; None without.
    """

    biased = 0  # numbers of a row after those of the D features

    def __init__(self, site: FeedForwardSite, init: float, begin: Upcycling) -> None:
        """init: standard deviation of the logits at the start, for inputs of unit root mean
        square."""
        super().__init__(site, stackable=True)
        self.offloads = False  # no plan at the cut says which of them a call takes
        self.init, self.begin = init, begin
        self.router = site.router
        self.parts = (*self.parts, self.router)
        self.rows, self.before = nn.ParameterList(), nn.ParameterList()
        self.shared = None if begin.shared is None else SharedExpert(site, begin.shared)
        self.whole = () if self.shared is None else self.shared.parts
        self.parts += self.whole

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        assert isinstance(self.site, FeedForwardSite)
        like, width = dense[self.site.parts[0].name], self.site.features + self.biased
        row = like.new_zeros(width, dtype=self.dtype_for(like.dtype))
        in_copy = len(self.rows) % self.begin.granularity
        if in_copy:
            row.copy_(self.rows[len(self.rows) - in_copy].detach())
        elif not row.is_meta:
            row.normal_(0.0, self.init / width**0.5)
        self.computes[self.router] = self._row_dtype(like.dtype)
        older = [r.detach() for r in self.rows]
        record = torch.stack(older) if older else row.new_zeros(0, width)
        self.before.append(nn.Parameter(record, requires_grad=False))
        self.rows.append(nn.Parameter(row))
        new = super().add(dense)
        if not row.is_meta:
            self._begin(dense)
        if self.shared is not None and not older:
            self.shared.dtype = self.dtype
            new += self.shared.add(dense)
        return [*new, self.rows[-1]]

    def _row_dtype(self, dense: torch.dtype) -> torch.dtype:
        """In which a graph takes rows."""
        return dense

    @torch.no_grad()
    def _begin(self, dense: dict[str, torch.Tensor]) -> None:
        """Make the newest expert, a share of a copy, what it begins as."""
        assert isinstance(self.site, FeedForwardSite)
        newest = [(part, copies[-1], dense[part.name]) for part, copies in self._by_part()]
        if self.begin.reinit:
            self.begin.redraw(newest)
        for part, own, _ in newest:
            if (factor := self.begin.factor(self.site, part)) != 1:
                own.mul_(factor)

    def remove(self, index: int) -> None:
        super().remove(index)
        self.rows = nn.ParameterList(r for e, r in enumerate(self.rows) if e != index)
        self.before = without(self.before, index)

    def remove_last(self) -> None:
        """The rows are bitwise what they were before this expert was added."""
        record, kept = self.before[-1], len(self.rows) - 1
        super().remove_last()
        self.rows, self.before = self.rows[:kept], self.before[:kept]
        with torch.no_grad():
            for row, old in zip(self.rows, record, strict=True):
                row.copy_(old)

    def stacked(self, active: Sequence[int]) -> tuple[Any, ...]:
        rows = [self.in_graph(self.router, e, self.rows[e]) for e in active]
        shared = [] if self.shared is None else self.shared.tensors()
        return (*super().stacked(active), rows, *shared)

    def stacked_apart(self, active: Sequence[int]) -> tuple[torch.Tensor, ...] | None:
        if not active:
            return None
        of_part = zip(self.parts, self.stacked(active), strict=True)
        return tuple(s if part in self.whole else torch.stack(s) for part, s in of_part)

    # -- the shared expert goes along --------------------------------------------------------------

    def train_shared(self, on: bool) -> None:
        if self.shared is not None:
            self.shared.train_all(on)

    def merged(
        self, expert: int, dense: dict[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        if self.shared is not None:
            raise ConfigError(
                f"{self.site.name}: a row has a shared expert beside this one, which no dense "
                "feed-forward of this width computes"
            )
        return super().merged(expert, dense, scale)

    def quantize(self, dtype: str) -> None:
        super().quantize(dtype)
        if self.shared is not None:
            self.shared.quantize(dtype)

    def follow(self, fn: Any) -> None:
        super().follow(fn)
        if self.shared is not None:
            self.shared.follow(fn)

    def forget(self) -> None:
        super().forget()
        if self.shared is not None:
            self.shared.forget()
