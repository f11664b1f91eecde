"""A token gate in closed form: ridge regression of the expert's identity on random features.

The shallow segment is frozen, so the features never drift and sums over samples are sufficient: the
solution does not depend on the order of tasks, and no sample has to be kept (RanPAC, arXiv
2307.02251, section 4; Any-SSR, arXiv 2503.13575).

Shapes: D width of the features, M random features.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import TokenRouter
from .packed_rows import RowMask
from .router import Router
from .token_gate import TokenGate, counted_rows


class AnalyticGate(TokenGate):
    """The gate of ``TokenRouter(fit="analytic")``.

    rows[e]: (M + 1,) fp32, solved and never trained.
    frozen: (M + 1,) fp32, the frozen model's row.
    lift: (D, M) fixed random projection.
    moments[c]: (M + 1, M + 1) float64, the sum of f f^T over the samples of class c, where f is the
        random features with a 1 appended. Class 0 is the frozen model, class e + 1 expert e.
    """

    frozen: torch.Tensor
    lift: torch.Tensor

    def __init__(self, spec: TokenRouter, width: int, device: torch.device) -> None:
        Router.__init__(self, spec, spec.projection + 1, device)
        draw = torch.Generator().manual_seed(0)
        lift = torch.randn(width, spec.projection, generator=draw) / width**0.5
        self.register_buffer("lift", lift.to(device))
        self.register_buffer("frozen", torch.zeros(self.size, device=device))
        self.moments = nn.ParameterList([self._no_moments()])

    def require_analytic(self) -> None:
        pass

    def _no_moments(self) -> nn.Parameter:
        zeros = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        return nn.Parameter(zeros, requires_grad=False)

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        """Add rows; no parameters are returned, since rows are solved and not trained."""
        for row in super().add(count, active):
            row.requires_grad_(False)
            self.moments.append(self._no_moments())
        return []

    def remove_last(self) -> None:
        super().remove_last()
        self.moments = self.moments[:-1]
        self.solve()

    def remove(self, index: int) -> None:
        """The other rows are solved again, as if this expert had never been added."""
        super().remove(index)
        self.moments = nn.ParameterList(m for c, m in enumerate(self.moments) if c != index + 1)
        self.solve()

    @torch.no_grad()
    def observe(self, features: torch.Tensor, mask: RowMask, expert: int | None) -> None:
        """Add these features' rows to the statistics of an expert, or (None) of the frozen model.

        Masked rows are left out. Nothing else changes until `solve`.
        """
        read, _, _ = self._read(features, mask, None)
        rows = read.reshape(-1, read.shape[-1])
        if mask is not None and read.ndim == 3 and read.shape[1] == features.shape[1]:
            rows = rows[counted_rows(mask, read).reshape(-1)]
        f = _with_one(rows).double()
        self.moments[0 if expert is None else expert + 1] += f.T @ f

    @torch.no_grad()
    def solve(self) -> None:
        """Solve every row, ``(G + r I)^-1 c``, from the sums; all classes have the same weight.

        G is the sum over classes of their mean f f^T, c a class's mean f, r is `ridge` times the
        mean diagonal of G. A class without samples gets a row of zeros.
        """
        means = [m / m[-1, -1] if m[-1, -1] > 0 else m for m in self.moments]
        if not any(m[-1, -1] > 0 for m in means) or means[0].is_meta:
            return
        total = torch.stack(means).sum(0)
        total.diagonal().add_(self.spec.ridge * total.diagonal().mean())
        solved = torch.linalg.solve(total, torch.stack([m[:, -1] for m in means], 1))
        self.frozen.copy_(solved[:, 0])
        for row, column in zip(self.rows, solved[:, 1:].T, strict=True):
            row.copy_(column)

    def _lifted(self, x: torch.Tensor) -> torch.Tensor:
        """Random features of each position: averaging comes later, since their mean holds more
        information than the random features of a mean."""
        return (x @ self.lift).relu()

    def _with_prior(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if not self.spec.base:
            return logits
        base = logits[..., :1] + self.spec.sharpness * self.spec.prior / seen
        return torch.cat([base, logits[..., 1:]], dim=-1)

    def _logits(self, read: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        solved = [self.frozen.unsqueeze(0)] if self.spec.base else []
        if rows is not None:
            solved.append(rows)
        if not solved:
            return read.new_zeros(*read.shape[:-1], 0)
        return self.spec.sharpness * (_with_one(read) @ torch.cat(solved).T)


def _with_one(f: torch.Tensor) -> torch.Tensor:
    return torch.cat([f, f.new_ones(*f.shape[:-1], 1)], dim=-1)
