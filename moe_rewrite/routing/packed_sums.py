"""Symmetric matrices in host memory, half of each, and the one that rows are being added to.

Shapes: n rows and columns; packed: (n (n + 1) / 2,), the upper triangle, row by row.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

LOCK = threading.RLock()  # forwards in several threads add to the same sums


def packed(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[*_upper(len(matrix))]


def unpacked(triangle: torch.Tensor) -> torch.Tensor:
    size = side(triangle)
    rows, columns = _upper(size)
    matrix = triangle.new_empty(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def last_column(triangle: torch.Tensor) -> torch.Tensor:
    """(n,): the end of every row."""
    return triangle[torch.arange(side(triangle), 0, -1).cumsum(0) - 1]


def side(triangle: torch.Tensor) -> int:
    return round((8 * len(triangle) + 1) ** 0.5 - 1) // 2


def length(size: int) -> int:
    """Numbers of a packed matrix."""
    return size * (size + 1) // 2


def _upper(size: int) -> torch.Tensor:
    return torch.triu_indices(size, size)


class PackedSums(nn.Module, ABC):
    """Sums in buffers of host memory, float64, since devices hold few matrices and tools that shard
    parameters over processes (FSDP2) leave buffers whole.

    Rows are added to a whole matrix on their device. It is packed into its buffer when somebody
    reads: whoever does calls `close` first.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._open: tuple[torch.Tensor, torch.Tensor] | None = None  # (buffer, whole matrix)

    @abstractmethod
    def append(self, device: torch.device) -> None:
        """A class without rows."""

    @abstractmethod
    def drop(self, index: int) -> None:
        """Remove a class."""

    @abstractmethod
    def clear(self, index: int) -> None:
        """Drop the rows of a class."""

    @abstractmethod
    def add(self, index: int, products: torch.Tensor) -> None:
        """Add the sum of f f^T over rows of a class."""

    @abstractmethod
    def join(self, index: int, other: int) -> None:
        """Give the rows of another class to a class. Raises ConfigError where that cannot be."""

    @abstractmethod
    def counts(self) -> list[float]:
        """Rows of each class."""

    @abstractmethod
    def gram(self) -> torch.Tensor:
        """(M + 1, M + 1): the sum over classes of their mean f f^T."""

    @abstractmethod
    def sides(self) -> torch.Tensor:
        """(M + 1, classes): what the rows of the router are solved for, the mean f of each class."""

    def require_open(self, index: int) -> None:
        """Raises ConfigError if a class can take no more rows."""

    @abstractmethod
    def holds_infinities(self) -> int:
        """The first class whose sums are not finite."""

    def close(self) -> None:
        """Pack the matrix that rows were added to."""
        with LOCK:
            if self._open is not None:
                buffer, whole = self._open
                self._open = None
                buffer.copy_(packed(whole))

    def _add(self, buffer: torch.Tensor, products: torch.Tensor) -> None:
        with LOCK:
            if self._open is None or self._open[0] is not buffer:
                self.close()
                self._open = buffer, unpacked(buffer).to(products.device)
            self._open[1].add_(products)

    def _zeros(self, device: torch.device, *shape: int) -> torch.Tensor:
        """In host memory, but of a model without values."""
        host = device if device.type == "meta" else torch.device("cpu")
        return torch.zeros(shape or length(self.size), dtype=torch.float64, device=host)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Stay in host memory when the model moves; take on values where it had none."""
        self.close()

        def on_host(buffer: torch.Tensor) -> torch.Tensor:
            if fn(buffer.new_empty(0)).device.type not in ("cpu", "meta") and not buffer.is_meta:
                return buffer
            moved = fn(buffer)
            return moved if moved.is_meta else moved.cpu()

        return super()._apply(on_host, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self.close()
        return dict(self.__dict__)

    def _save_to_state_dict(self, *given: Any) -> None:
        self.close()
        super()._save_to_state_dict(*given)

    def _load_from_state_dict(self, *given: Any) -> None:
        self.close()
        super()._load_from_state_dict(*given)
