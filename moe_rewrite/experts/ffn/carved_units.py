"""A feed-forward's own hidden units as experts, with a router that was fitted to calibration rows.

Shapes: D width of rows, H hidden units, E experts, T calibration rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import InputError
from ...ir.sites import FeedForwardSite
from ...routing.class_sums import with_one
from ..carved import CarvedExperts
from .call import Body, matrix
from .grouping import grouped
from .routed_copies import RoutedCopies, Upcycling

CHUNK = 1024  # rows whose hidden values are computed at once


class CarvedUnits(RoutedCopies):
    """Experts that are parts of one copy.

    rows[e]: (D + 1,), the last of it a bias, or without one (D,). A graph takes it in float32.
    order: (H,) int64, the dense region's hidden units expert by expert.
    """

    site: FeedForwardSite
    order: torch.Tensor

    def __init__(self, site: FeedForwardSite, spec: CarvedExperts) -> None:
        super().__init__(site, 0.0, Upcycling())
        self.biased = int(spec.bias)
        self.register_buffer("order", torch.arange(site.hidden * spec.experts))

    def _row_dtype(self, dense: torch.dtype) -> torch.dtype:
        return torch.promote_types(dense, torch.float32)

    def stacked_apart(self, active: Sequence[int]) -> None:
        """Their number is fixed."""

    @torch.no_grad()
    def carve(
        self, order: torch.Tensor, rows_ED: torch.Tensor, dense: dict[str, torch.Tensor]
    ) -> None:
        """Have the experts take the dense weights in this order, and their router these rows."""
        self.order.copy_(order)
        for part, copies in self._by_part():
            own = dense[part.name]
            for e, copy in enumerate(copies):
                share = own
                for dim, kept in part.kept:
                    units = self.order[e * kept : (e + 1) * kept].to(own.device)
                    share = share.index_select(dim, units)
                copy.copy_(share)
        for row, fitted in zip(self.rows, rows_ED, strict=True):
            row.copy_(fitted)
        self.forget()


@torch.no_grad()
def fit(
    spec: CarvedExperts, x_TD: torch.Tensor, body: Body, dense: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order of the hidden units, (E, D + 1) or (E, D) rows of the router) for a region, of the rows that it
    reads. Raises InputError for values that are not finite."""
    weights: Any = [w.detach() for w in dense]
    hidden_TH = torch.cat([body.hidden(x, weights).float() for x in x_TD.split(CHUNK)])
    if not bool(hidden_TH.isfinite().all()):
        raise InputError(
            "the calibration rows of a feed-forward hold infinities or NaN: pass batches on which "
            "the model computes finite values"
        )
    down_DH = matrix(body.down, weights).float()
    norms_H = down_DH.norm(dim=0)
    for up in body.ups:
        norms_H = norms_H * matrix(up, weights).float().norm(dim=1)
    order = grouped(spec, hidden_TH.abs() * down_DH.norm(dim=0), norms_H).to(x_TD.device)
    size = len(order) // spec.experts
    norms_TE = torch.stack(
        [(hidden_TH[:, u] @ down_DH[:, u].T).norm(dim=1) for u in order.split(size)], 1
    )
    targets = norms_TE / norms_TE.mean().clamp_min(1e-30)
    return order, _ridge(x_TD, targets, spec.ridge, spec.bias)


def _ridge(x_TD: torch.Tensor, y_TE: torch.Tensor, ridge: float, bias: bool) -> torch.Tensor:
    """(E, D + 1) rows whose products with x and a 1 predict y, or without the 1 (E, D), from sums in
    float64."""
    width = x_TD.shape[1] + bias
    gram = torch.zeros(width, width, dtype=torch.float64, device=x_TD.device)
    moments = torch.zeros(width, y_TE.shape[1], dtype=torch.float64, device=x_TD.device)
    for x, y in zip(x_TD.split(CHUNK), y_TE.split(CHUNK), strict=True):
        f = (with_one(x.float()) if bias else x).double()
        gram.addmm_(f.T, f)
        moments.addmm_(f.T, y.double())
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, moments).T.float()
