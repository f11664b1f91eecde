"""The rows of each expert, sorted once for all sites with the same gate layout.

Shapes: T rows, E experts (the frozen model first, if the router has a gate for it), K experts a row
at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.plan.op import Plan, dense_plan, largest, sort_plan


@dataclass(frozen=True)
class Dispatch:
    """Which rows go to which experts.

    experts_TK: int64, the experts of each row, -1 for none.
    plan: the (row, choice) pairs sorted by expert.
    every: all rows go to all experts.
    """

    experts_TK: torch.Tensor
    plan: Plan
    every: bool


@dataclass(frozen=True)
class RowGates:
    """Gates in the layout of a site's rows.

    gates: (..., E) fp32, to be broadcast over the rows.
    top_k: experts a row at most, as in RoutingPlan.
    base: whether expert 0 is the frozen model.
    """

    gates: torch.Tensor
    top_k: int | None
    base: bool
    _made: dict[tuple[int, ...], Dispatch] = field(default_factory=dict)

    def over(self, lead: tuple[int, ...]) -> tuple[torch.Tensor, Dispatch]:
        """(gates_TE, dispatch) for rows with these leading dimensions, flattened.

        The dispatch is made for the first site and kept for the others; it carries no gradient.
        """
        gates_TE = self.gates.expand(*lead, -1).reshape(-1, self.gates.shape[-1])
        if torch.compiler.is_compiling():  # nothing outlives compiled code
            return gates_TE, _dispatch(gates_TE.detach(), self.top_k)
        if lead not in self._made:
            self._made[lead] = _dispatch(gates_TE.detach(), self.top_k)
        return gates_TE, self._made[lead]


@dataclass(frozen=True)
class Watch:
    """Instead of gates: the dense region runs, and what it computes with is shown.

    show: is called with (rows (..., D), the region as a function, its dense weights).
    """

    show: Callable[[torch.Tensor, Any, tuple], None]


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
