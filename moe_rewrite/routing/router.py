"""Base of all routers: one row of parameters per expert, which experts are active, and a record of
the state before each expert was added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..utils.latest import Latest
from ..utils.own_thread import apart
from ..utils.sharded import gathered, gathered_to_run
from .packed_rows import RowMask
from .plan import RoutingPlan


@dataclass(frozen=True)
class GivenRows:
    """Parameters that replace a router's own, in an exported graph.

    active: indices of the experts.
    rows: (E, size) rows of these experts; None without any.
    open: E may be any number.
    """

    active: tuple[int, ...]
    rows: torch.Tensor | None
    open: bool


@dataclass(frozen=True, eq=False)
class _Known:
    """indices: of the experts that are on by these flags, when the tensor had this version."""

    flags: torch.Tensor
    version: int
    indices: tuple[int, ...]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a router reads its own flags, whose versions start anew."""


def _indices(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


def _either(active: torch.Tensor, pending: torch.Tensor) -> list[bool]:
    return (active | pending).tolist()


def without(before: nn.ParameterList, index: int) -> nn.ParameterList:
    """Records of what was before each expert was added, (e, ...), without one of the experts."""
    kept = [record.detach() for e, record in enumerate(before) if e != index]
    for e in range(index, len(kept)):
        kept[e] = torch.cat([kept[e][:index], kept[e][index + 1 :]])
    return nn.ParameterList(nn.Parameter(record, requires_grad=False) for record in kept)


class Router(nn.Module):
    """One row of fp32 parameters per expert, which stay fp32 when the model is cast.

    rows[e]: (size,) parameters of expert e.
    active: (experts,) bool. An inactive expert takes no part, so adding one changes no bit of the
        others' gates.
    pending: (experts,) bool, those that the first forward in training mode activates.
    before[e]: (e, size + 2), rows and flags just before expert e was added.
    """

    active: torch.Tensor
    pending: torch.Tensor
    by_row = False  # rows choose their experts
    by_layer = False  # every layer has a router of its own, this one only says which experts are on
    biased = False  # each row of parameters ends in a bias
    by_sums = False  # solved from sums over rows
    copied = False  # every process has the same rows (tensor parallel), which count once
    told: list[bool]  # if so: of each expert, whether its sums were given
    unknown: tuple[int, ...] = ()  # experts of whose rows an analytic router knows nothing
    mixes_rows = False  # a row's gates depend on other rows of its sample
    keeps_state = False  # a row's gates depend on the rows before it, through a state

    def __init__(self, spec: Any, size: int, device: torch.device) -> None:
        super().__init__()
        self.spec, self.size = spec, size
        self.rows = nn.ParameterList()
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("pending", torch.zeros(0, dtype=torch.bool))
        self._flags = self.active, self.pending
        self._known: _Known | None = None  # see `active_indices`
        self._latest: Latest | None = None  # see `stacked`
        self.before = nn.ParameterList()
        self.device = device

    def __len__(self) -> int:
        return len(self.rows)

    def new_row(self) -> torch.Tensor:
        return torch.zeros(self.size, device=self.device)

    def needs_one(self) -> bool:
        """Whether at least one expert must be active."""
        return False

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        """Add `count` rows, with records of the router before each; returns the new parameters."""
        new = []
        for _ in range(count):
            self.active, self.pending = self.active.cpu(), self.pending.cpu()  # FSDP moves buffers
            flags = torch.stack([self.active, self.pending], 1).to(self.device, torch.float32)
            record = torch.cat([self._rows_before(), flags], 1)
            self.before.append(nn.Parameter(record, requires_grad=False))
            self.rows.append(nn.Parameter(self.new_row()))
            new.append(self.rows[-1])
            self.active = torch.cat([self.active, torch.tensor([active])])
            self.pending = torch.cat([self.pending, torch.tensor([not active])])
        return new

    def _rows_before(self) -> torch.Tensor:
        """(e, size): the rows as they are, for the record of the next expert."""
        rows = [gathered(r.detach()) for r in self.rows]
        return torch.stack(rows) if rows else torch.zeros(0, self.size, device=self.device)

    def remove_last(self) -> None:
        """Remove the last row and restore everything to what it was before that was added."""
        record = self.before[-1]
        self.rows, self.before = self.rows[:-1], self.before[:-1]
        with torch.no_grad():
            for row, old in zip(self.rows, record[:, :-2], strict=True):
                if len(old):
                    row.copy_(old)
        if record.is_meta:  # a meta tensor has no values to restore
            self.active, self.pending = self.active[:-1], self.pending[:-1]
            return
        flags = record[:, -2:].bool().cpu()
        self.active, self.pending = flags[:, 0].clone(), flags[:, 1].clone()

    def remove(self, index: int) -> None:
        """Remove a row, and its values from the records of the rows that were added later; the
        other rows and flags are not touched."""
        keep = [e for e in range(len(self.rows)) if e != index]
        self.rows = nn.ParameterList([self.rows[e] for e in keep])
        self.before = without(self.before, index)
        self.active, self.pending = self.active[keep].clone(), self.pending[keep].clone()

    def set_active(self, index: int, on: bool) -> None:
        if not on and self.needs_one() and self.active_indices() == (index,):
            raise ConfigError(
                f"expert {index} is the last one that is on and the router has no base: "
                "activate another first"
            )
        self.active[index], self.pending[index] = on, False

    def activate_pending(self) -> None:
        if torch.compiler.is_exporting():  # a trace in training mode changes the flags themselves
            apart(self._activate_pending)
        else:
            self._activate_pending()

    def on_in_training(self) -> list[bool]:
        """Of each expert, whether it is on in a forward in training mode."""
        flags = self._flags
        return apart(_either, *flags) if torch.compiler.is_exporting() else _either(*flags)

    def _activate_pending(self) -> None:
        active, pending = self._flags
        if bool(pending.any()):
            active |= pending
            pending.zero_()

    def stacked(self, active: tuple[int, ...]) -> torch.Tensor:
        """(len(active), size): the rows of these experts; in inference kept until one changes."""
        table: dict[str, Any] = self.rows._parameters
        if self.training or torch.is_grad_enabled():
            return torch.stack([gathered_to_run(table[str(e)]) for e in active])
        latest = self._latest
        if latest is not None and latest.serves((table,), active):
            return latest.value
        rows = torch.stack([gathered_to_run(table[str(e)]) for e in active])
        self._latest = Latest.of((table,), active, rows)
        return rows

    def forget(self) -> None:
        """Drop what is kept of the rows, to which an optimizer may have written through `.data`."""
        self._latest = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("active", "pending"):  # torch.export exchanges the buffers, but not these
            self.__dict__["_flags"] = self.active, self.pending

    def active_indices(self) -> tuple[int, ...]:
        """Indices of the experts that are on, read again only when the flags have changed; a trace
        takes them for constants."""
        flags, known = self._flags[0], self._known
        version = -1 if flags.is_inference() else flags._version
        if known is None or known.flags is not flags or known.version != version or version < 0:
            exporting = torch.compiler.is_exporting()
            indices = apart(_indices, flags) if exporting else _indices(flags)
            self._known = known = _Known(flags, version, indices)
        return known.indices

    def _apply(self, fn, recurse: bool = True):
        """Move with the model but keep the dtype; flags stay on the CPU, as Python reads them."""

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
        self, features: torch.Tensor, mask: RowMask, state: Any,
        given: GivenRows | None = None,
    ) -> tuple[RoutingPlan, Any]:  # fmt: skip
        """The plan for the features at the cut, and the state after these rows."""
        raise NotImplementedError

    def _chosen(self, given: GivenRows | None) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """The active experts, and their rows."""
        if given is not None:
            return given.active, given.rows
        active = self.active_indices()
        return active, self.stacked(active) if active else None

    def without_experts(self, features: torch.Tensor) -> RoutingPlan:
        """The plan of the dense model: no expert is active."""
        raise NotImplementedError

    # -- for some kinds of routers only -----------------------------------------------------------

    def require_rows(self, what: str) -> None:
        """Raises ConfigError where experts choose among patches."""
        if not self.by_row:
            raise ConfigError(f"{what}: a PatchRouter's experts choose patches; use activate()")

    def fixed_gates(self, features: torch.Tensor, gates: dict[int, float]) -> RoutingPlan:
        """The plan that gives every row to these experts with these gates, and what is left of 1 to
        the frozen model."""
        raise NotImplementedError

    def everything(self, features: torch.Tensor) -> RoutingPlan:
        """The plan in which the frozen region takes every patch, or every row each expert."""
        raise NotImplementedError

    def require_analytic(self) -> None:
        """Raises ConfigError unless the router is solved in closed form."""
        raise ConfigError(
            "fit_router, remember: this router is trained; convert with router=TokenRouter(fit='analytic') "
            "to solve it in closed form"
        )

    def facts(self) -> dict[str, Any]:
        """What a save says beside tensors; see `checkpoint.Facts`."""
        return {}

    def close_sums(self) -> None:
        """Before buffers are read: bring those of an analytic router up to date."""

    def in_this_layout(
        self, state: Mapping[str, torch.Tensor], prefix: str
    ) -> dict[str, torch.Tensor]:
        """Those of a save of an older version that this one lays out in another way, as it does.

        prefix: before the router's names in the save.
        """
        return {}

    def settle(self) -> None:
        """Solve an analytic router, if its sums have changed since."""

    def after_loading(self, told: list[bool] | None, solved: bool) -> None:
        """Tensors were loaded. told, solved: see `AnalyticGate`; told None: a save of a version that
        took no sums in training."""

    def join(self, index: int, other: int) -> None:
        """Give the rows of another expert to an expert, before the other is removed."""
        raise ConfigError(
            "join_experts: this router is trained, and no row of its parameters is known to choose "
            "the rows of both; convert with router=TokenRouter(fit='analytic')"
        )

    def solve(self) -> None:
        """Solve an analytic router from its sums."""
        self.require_analytic()
