"""Copies of a feed-forward beside the rows of the region's own router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...ir.sites import FeedForwardSite
from ...routing.router import without
from ..copies import CopiedParameters


class RoutedCopies(CopiedParameters):
    """rows[e]: (D,), expert e's row of the region's router: random, or all rows would go to the
    first experts. A graph takes it in the dtype of the dense weights, as models with such routers
    have it. Rows stay trainable when experts are frozen.

    before[e]: (e, D), the rows just before expert e was added.
    """

    def __init__(self, site: FeedForwardSite, init: float) -> None:
        """init: standard deviation of the logits at the start, for inputs of unit root mean
        square."""
        super().__init__(site, stackable=True)
        self.init = init
        self.router = site.router
        self.parts = (*self.parts, self.router)
        self.rows, self.before = nn.ParameterList(), nn.ParameterList()

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        assert isinstance(self.site, FeedForwardSite)
        like, width = dense[self.site.parts[0].name], self.site.features
        row = like.new_zeros(width, dtype=self.dtype_for(like.dtype))
        if not row.is_meta:
            row.normal_(0.0, self.init / width**0.5)
        self.computes[self.router] = like.dtype
        older = [r.detach() for r in self.rows]
        record = torch.stack(older) if older else row.new_zeros(0, width)
        self.before.append(nn.Parameter(record, requires_grad=False))
        self.rows.append(nn.Parameter(row))
        return [*super().add(dense), self.rows[-1]]

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

    def stacked(self, active: Sequence[int]) -> tuple[list[Any], ...]:
        rows = [self.in_graph(self.router, e, self.rows[e]) for e in active]
        return (*super().stacked(active), rows)
