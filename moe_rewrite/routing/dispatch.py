"""The rows of each expert, sorted once for every site whose rows lie alike.

Shapes: T rows, E experts (the frozen model first, where the router has a gate for it), K experts
that a row goes to at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..kernels.plan.op import Plan, dense_plan, largest, sort_plan


@dataclass(frozen=True)
class Dispatch:
    """Which rows go where. experts_TK: int64, of each row, -1 for none. plan: its pairs by expert.
    every: all rows go to all experts."""

    experts_TK: torch.Tensor
    plan: Plan
    every: bool


@dataclass(frozen=True)
class RowGates:
    """Gates laid out as a site's rows. gates: fp32, (..., E), to be broadcast over the rows.

    per_row: see RoutingPlan. base: whether expert 0 is the frozen model.
    """

    gates: torch.Tensor
    top_k: int | None
    base: bool
    _made: dict[tuple[int, ...], Dispatch] = field(default_factory=dict)

    def over(self, lead: tuple[int, ...]) -> tuple[torch.Tensor, Dispatch]:
        """gates_TE of rows of these leading dimensions, flattened, and their dispatch, which is
        made for the first site that asks and holds nothing to differentiate."""
        gates_TE = self.gates.expand(*lead, -1).reshape(-1, self.gates.shape[-1])
        if lead not in self._made:
            self._made[lead] = _dispatch(gates_TE.detach(), self.top_k)
        return gates_TE, self._made[lead]


def _dispatch(gates_TE: torch.Tensor, top_k: int | None) -> Dispatch:
    rows, experts = gates_TE.shape
    each = torch.arange(experts, device=gates_TE.device).expand(rows, experts)
    if top_k is not None and top_k >= experts:
        return Dispatch(each, dense_plan(rows, experts, gates_TE.device), True)
    if top_k is None:
        experts_TK = each.masked_fill(gates_TE == 0, -1)
    else:
        experts_TK = largest(gates_TE, top_k)
        experts_TK = experts_TK.masked_fill(gates_TE.gather(1, experts_TK) == 0, -1)
    return Dispatch(experts_TK, sort_plan(experts_TK, experts), False)
