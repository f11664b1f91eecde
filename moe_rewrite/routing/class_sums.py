"""The sums from which an analytic router is solved: a matrix for each class of rows.

Shapes: M random features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

_ADDING = threading.Lock()  # forwards in several threads add to the same sums


class ClassSums(nn.Module):
    """One float64 buffer (M + 1, M + 1) for each class: the sum of f f^T over its rows, where f is
    a row's random features with a 1 appended. So the last element is the number of rows.

    Buffers, since tools that shard parameters over processes (FSDP2) leave them whole.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[c] for c in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.get_buffer(str(index))

    def append(self, device: torch.device) -> None:
        """A class without rows."""
        zeros = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        self.register_buffer(str(len(self)), zeros)

    def drop(self, index: int) -> None:
        kept = [m for c, m in enumerate(self) if c != index]
        self._buffers.clear()
        for c, matrix in enumerate(kept):
            self.register_buffer(str(c), matrix)

    @torch.no_grad()
    def add(self, index: int, products: torch.Tensor) -> None:
        with _ADDING:
            self[index].add_(products)

    def counts(self) -> list[float]:
        """Rows of each class."""
        return torch.stack([m[-1, -1] for m in self]).tolist()


def products_of(rows: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """(M + 1, M + 1) float64: the sum of f f^T over rows (rows, M) of random features.

    counted: (rows,) bool, those that count; None: all.
    """
    f = with_one(rows)
    if counted is not None:  # selecting them would wait for the device
        f = f.masked_fill(~counted.unsqueeze(-1), 0.0)
    f = f.double()
    return f.T @ f


def with_one(f: torch.Tensor) -> torch.Tensor:
    return torch.cat([f, f.new_ones(*f.shape[:-1], 1)], dim=-1)


def over_processes(products: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of a training. Each must ask for it as often as the others."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(products)
    return products
