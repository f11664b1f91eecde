"""How a plan's rows lie over the rows of a site, so that gates broadcast over these.

Shapes: B batch, S positions, G values of a row (its gates, or each of them for every rank).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from .patch_grid import shares


class GateLayout(ABC):
    """A frozen dataclass, so that sites with equal layouts share what is laid out."""

    @abstractmethod
    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        """gates: (B, S, G), (B, 1, G) or (B, G); of patches (B, n, G). rows: (B, S) or (B,) of the
        features at the cut. grid: patches along each side."""


@dataclass(frozen=True)
class Rows(GateLayout):
    """Rows of `ndim` dimensions (B, S, ..., D)."""

    ndim: int

    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates, self.ndim)


@dataclass(frozen=True)
class Samples(GateLayout):
    """Rows of `ndim` dimensions (B, ..., D), all those of a sample with its one row of gates."""

    ndim: int

    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates.squeeze(1) if gates.ndim == 3 else gates, self.ndim)


@dataclass(frozen=True)
class Swapped(GateLayout):
    """Rows of `ndim` dimensions (S, B, ..., D)."""

    ndim: int

    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        return _of_rank(gates.expand(*rows, -1).transpose(0, 1), self.ndim)


@dataclass(frozen=True)
class Flat(GateLayout):
    """Rows (B * S, D), or (S * B, D) if swapped."""

    swapped: bool

    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        gates = gates.expand(*rows, -1)
        batch, length = rows
        return (gates.transpose(0, 1) if self.swapped else gates).reshape(batch * length, -1)


@dataclass(frozen=True)
class OverMap(GateLayout):
    """A map (B, ..., H, W), or (B, H, W, ...) with channels last.

    size: its (H, W), where patches of the map at the cut are laid over it; None where a sample has
    one row of gates.
    """

    channels_last: bool
    size: tuple[int, int] | None

    def lay(self, gates: torch.Tensor, rows: tuple[int, ...], grid: int) -> torch.Tensor:
        if self.size is None:
            gates = gates.reshape(gates.shape[0], 1, 1, -1)
        else:  # a patch's share of a position, where the map has another resolution
            down, across = (shares(n, grid).to(gates) for n in self.size)
            cells = gates[:, gates.shape[1] - grid * grid :].unflatten(1, (grid, grid))
            gates = torch.einsum("yi,xj,bije->byxe", down, across, cells)
        return gates if self.channels_last else gates.permute(0, 3, 1, 2)


def _of_rank(gates: torch.Tensor, ndim: int) -> torch.Tensor:
    while gates.ndim < ndim:
        gates = gates.unsqueeze(-2)
    return gates
