"""What every router has: one row of parameters per expert, which experts are on, and a record of
what it was before each expert came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .plan import RoutingPlan


@dataclass(frozen=True)
class GivenRows:
    """Parameters that replace a router's own: rows (E, size) of the experts `active`, None where
    none is on. open: there may be any number of them."""

    active: tuple[int, ...]
    rows: torch.Tensor | None
    open: bool


class Router(nn.Module):
    """One row of fp32 parameters per expert, which stay fp32 when the model is cast.

    rows[e]: (size,). active: which experts are on; an expert that is off takes no part, so adding
    one changes no bit of the others' gates. pending: those that the first forward in training mode
    turns on. before[e]: (e, size + 2), rows and flags as they were when expert e came.
    """

    active: torch.Tensor
    pending: torch.Tensor
    by_row = False  # rows choose their experts
    biased = False  # each row of parameters ends in a bias
    keeps_state = False  # what it reads of a row depends on the rows before it

    def __init__(self, spec: Any, size: int, device: torch.device) -> None:
        super().__init__()
        self.spec, self.size = spec, size
        self.rows = nn.ParameterList()
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("pending", torch.zeros(0, dtype=torch.bool))
        self.before = nn.ParameterList()
        self.device = device

    def __len__(self) -> int:
        return len(self.rows)

    def new_row(self) -> torch.Tensor:
        return torch.zeros(self.size, device=self.device)

    def needs_one(self) -> bool:
        """Whether some expert must be on for there to be a plan."""
        return False

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        """Add `count` new rows, each with a record of what the router was before it."""
        new = []
        for _ in range(count):
            flags = torch.stack([self.active, self.pending], 1).to(self.device, torch.float32)
            rows = [r.detach() for r in self.rows]
            older = torch.stack(rows) if rows else torch.zeros(0, self.size, device=self.device)
            record = torch.cat([older, flags], 1)
            self.before.append(nn.Parameter(record, requires_grad=False))
            self.rows.append(nn.Parameter(self.new_row()))
            new.append(self.rows[-1])
            self.active = torch.cat([self.active, torch.tensor([active])])
            self.pending = torch.cat([self.pending, torch.tensor([not active])])
        return new

    def remove_last(self) -> None:
        """Take the last row off and set all else to what it was before it came."""
        record = self.before[-1]
        self.rows, self.before = self.rows[:-1], self.before[:-1]
        with torch.no_grad():
            for row, old in zip(self.rows, record[:, :-2], strict=True):
                row.copy_(old)
        if record.is_meta:  # which holds no values to go back to
            self.active, self.pending = self.active[:-1], self.pending[:-1]
            return
        flags = record[:, -2:].bool().cpu()
        self.active, self.pending = flags[:, 0].clone(), flags[:, 1].clone()

    def set_active(self, index: int, on: bool) -> None:
        if not on and self.needs_one() and self.active_indices() == (index,):
            raise ConfigError(
                f"expert {index} is the last one that is on and the router has no base: "
                "activate another first"
            )
        self.active[index], self.pending[index] = on, False

    def activate_pending(self) -> None:
        if bool(self.pending.any()):
            self.active |= self.pending
            self.pending.zero_()

    def stacked(self, active: tuple[int, ...]) -> torch.Tensor:
        """(len(active), size): the rows of these experts."""
        return torch.stack([self.rows[e] for e in active])

    def active_indices(self) -> tuple[int, ...]:
        return tuple(self.active.nonzero().flatten().tolist())

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, keep the dtype; the flags stay on the CPU (they steer Python)."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        flags = self.active, self.pending
        super()._apply(keep_dtype, recurse)
        self.active, self.pending = flags
        if len(self.rows):
            self.device = self.rows[0].device
        return self

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor | None, state: Any,
        given: GivenRows | None = None,
    ) -> tuple[RoutingPlan, Any]:  # fmt: skip
        """The plan for the features at the cut, and the state after these rows."""
        raise NotImplementedError

    def _chosen(self, given: GivenRows | None) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """The experts that are on, and their rows."""
        if given is not None:
            return given.active, given.rows
        active = self.active_indices()
        return active, self.stacked(active) if active else None

    def without_experts(self, features: torch.Tensor) -> RoutingPlan:
        """The plan of the dense model: no expert is on."""
        raise NotImplementedError

    # -- what only some routers can ---------------------------------------------------------------

    def require_rows(self, what: str) -> None:
        """Raises ConfigError where experts choose among patches."""
        if not self.by_row:
            raise ConfigError(f"{what}: a PatchRouter's experts choose patches; use activate()")

    def one_expert(self, features: torch.Tensor, expert: int) -> RoutingPlan:
        """The plan that gives every row to one expert, with gate 1."""
        raise NotImplementedError

    def everything(self, features: torch.Tensor) -> RoutingPlan:
        """The plan in which the frozen region takes every patch."""
        raise NotImplementedError

    def require_analytic(self) -> None:
        """Raises ConfigError unless the router is solved in closed form."""
        raise ConfigError(
            "fit_router: this router is trained; convert with router=TokenRouter(fit='analytic') "
            "to solve it in closed form"
        )

    def observe(
        self, features: torch.Tensor, mask: torch.Tensor | None, expert: int | None
    ) -> None:
        """Count the rows of these features as an expert's, or (None) as the frozen model's."""
        raise NotImplementedError

    def solve(self) -> None:
        """Put the sums of what was observed to use."""
        raise NotImplementedError
