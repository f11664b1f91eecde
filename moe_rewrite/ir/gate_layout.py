"""How a plan's gates are reshaped to broadcast over the rows of a site.

Shapes: B batch, S positions, G values of a row (its gates, or each gate repeated over the rank).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch

from .patch_grid import shares


class GateLayout(ABC):
    """A frozen dataclass: sites with equal layouts share the reshaped gates."""

    @abstractmethod
    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        """The gates, shaped to broadcast over the site's rows.

        gates: (B, S, G), (B, 1, G) or (B, G); for n patches (B, n, G).
        rows: (B, S) or (B,), the row dimensions of the features at the cut.
        grid: patches along each side.
        """


@dataclass(frozen=True)
class Rows(GateLayout):
    """Values of `ndim` dimensions (B, S, ..., D)."""

    ndim: int

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates, self.ndim)


@dataclass(frozen=True)
class LastRows(GateLayout):
    """Values of `ndim` dimensions (B, count, ..., D): the last rows of each sample."""

    ndim: int
    count: int

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates.expand(*rows, -1)[:, -self.count :], self.ndim)


@dataclass(frozen=True)
class Samples(GateLayout):
    """Values of `ndim` dimensions (B, ..., D), where all rows of a sample share its gates."""

    ndim: int

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates.squeeze(1) if gates.ndim == 3 else gates, self.ndim)


@dataclass(frozen=True)
class Swapped(GateLayout):
    """Values of `ndim` dimensions (S, B, ..., D)."""

    ndim: int

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates.expand(*rows, -1).transpose(0, 1), self.ndim)


@dataclass(frozen=True)
class Flat(GateLayout):
    """Rows (B * S, D), or (S * B, D) if swapped."""

    swapped: bool

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        gates = gates.expand(*rows, -1)
        return (gates.transpose(0, 1) if self.swapped else gates).flatten(0, 1)


@dataclass(frozen=True)
class Line(GateLayout):
    """A map over a line (B, C, S)."""

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return gates.transpose(1, 2)


@dataclass(frozen=True)
class OverMap(GateLayout):
    """A map (B, ..., H, W), or (B, H, W, ...) with channels last; with one row of gates a sample,
    over any number of axes.

    size: (H, W) of this map, if patches are routed; None if each sample has one row of gates.
    """

    channels_last: bool
    size: tuple[int, int] | None
    axes: int = 2

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        if self.size is None:
            gates = gates.reshape(gates.shape[0], *(1,) * self.axes, gates.shape[-1])
        else:  # each position takes the gates of the patches that cover it, by their shares
            down, across = (shares(n, grid).to(gates) for n in self.size)
            cells = gates[:, gates.shape[1] - grid * grid :].unflatten(1, (grid, grid))
            gates = torch.einsum("yi,xj,bije->byxe", down, across, cells)
        return gates if self.channels_last else gates.movedim(-1, 1)


@dataclass(frozen=True)
class Gathered(GateLayout):
    """Values (B * m, ..., D) whose rows are positions of a map or a sequence, in any order.

    size: (H, W) of a map over which patches are routed; () with one row of gates a sample; None for
        positions of the plan's rows (B, S).
    shape: (m, ...).
    positions: of each row of a sample, in order; -1 for a row that has none, whose gates are zero.
    """

    size: tuple[int, ...] | None
    shape: tuple[int, ...]
    positions: tuple[int, ...]

    def broadcast(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        batch, count = rows[0], gates.shape[-1]
        if self.size is None:
            cells = gates.expand(*rows, -1)
        elif self.size:
            height, width = self.size
            cells = OverMap(True, (height, width)).broadcast(gates, rows, grid).flatten(1, 2)
        else:
            cells = gates.reshape(batch, 1, count)
        if -1 in self.positions:
            cells = torch.cat([cells, cells.new_zeros(batch, 1, count)], dim=1)
        index = _index(self.positions).to(gates.device) % cells.shape[1]
        return cells[:, index].reshape(batch * self.shape[0], *self.shape[1:], count)


@lru_cache
def _index(positions: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(positions)


def _of_rank(gates: torch.Tensor, ndim: int) -> torch.Tensor:
    while gates.ndim < ndim:
        gates = gates.unsqueeze(-2)
    return gates
