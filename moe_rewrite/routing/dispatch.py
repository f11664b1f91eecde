"""The rows of each expert, sorted once for every site whose rows lie alike.

Shapes: T rows, E experts (the frozen model first, where the router has a gate for it), K experts
that a row goes to, N pairs of a row and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Dispatch:
    """Which rows go where, int64.

    rows_N: the rows of expert 0, then of expert 1, ..., each expert's in order; experts_N: of these
    pairs. offsets: (E + 1,), expert e has the pairs offsets[e] .. offsets[e + 1] - 1. experts_TK: of
    each row, where every row goes to K experts.
    """

    rows_N: torch.Tensor
    experts_N: torch.Tensor
    offsets: torch.Tensor
    experts_TK: torch.Tensor | None


@dataclass(frozen=True)
class RowGates:
    """Gates laid out as a site's rows. gates: fp32, (..., E), to be broadcast over the rows.

    per_row: see RoutingPlan. base: whether expert 0 is the frozen model.
    """

    gates: torch.Tensor
    per_row: int | None
    base: bool
    _made: dict[tuple[int, ...], Dispatch] = field(default_factory=dict)

    def over(self, lead: tuple[int, ...]) -> tuple[torch.Tensor, Dispatch]:
        """gates_TE of rows of these leading dimensions, flattened, and their dispatch, which is
        made for the first site that asks and holds nothing to differentiate."""
        gates_TE = self.gates.expand(*lead, -1).reshape(-1, self.gates.shape[-1])
        if lead not in self._made:
            make = _of_any if self.per_row is None else _of_k
            self._made[lead] = make(gates_TE.detach(), self.per_row or 0)
        return gates_TE, self._made[lead]


def _of_k(gates_TE: torch.Tensor, k: int) -> Dispatch:
    """Every row goes to the k experts with its largest gates, the first ones of equal gates."""
    experts = gates_TE.shape[1]
    if k >= experts:
        experts_TK = torch.arange(experts, device=gates_TE.device).expand_as(gates_TE)
    else:
        experts_TK = gates_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    flat = experts_TK.reshape(-1)
    pairs = flat.argsort(stable=True)
    rows_N = pairs.div(experts_TK.shape[1], rounding_mode="floor")
    return Dispatch(rows_N, flat[pairs], _offsets(flat, experts), experts_TK)


def _of_any(gates_TE: torch.Tensor, _: int) -> Dispatch:
    """Every row goes to the experts that have a gate for it."""
    experts_N, rows_N = gates_TE.T.nonzero(as_tuple=True)
    return Dispatch(rows_N, experts_N, _offsets(experts_N, gates_TE.shape[1]), None)


def _offsets(experts_N: torch.Tensor, experts: int) -> torch.Tensor:
    counts = experts_N.bincount(minlength=experts)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
