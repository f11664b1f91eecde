"""The sums from which an analytic router is solved: a matrix for each class of rows.

Shapes: M random features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from .packed_sums import LOCK, PackedSums, last_column, unpacked

Marks = list[tuple[torch.Tensor, int]]


class ClassSums(PackedSums):
    """One packed buffer for each class, named by its number: the sum of f f^T over its rows, where f
    is a row's random features with a 1 appended. So the last element is the number of rows.

    Any class can be dropped as if it had never been: what is left are the others' own matrices, and
    their sum is taken in their order.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._older: tuple[Marks, torch.Tensor | None] = [], None

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[c] for c in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        """(M + 1, M + 1), a copy."""
        return unpacked(self._packed()[index])

    def append(self, device: torch.device) -> None:
        self.register_buffer(str(len(self)), self._zeros(device))

    def drop(self, index: int) -> None:
        kept = [m for c, m in enumerate(self._packed()) if c != index]
        self._buffers.clear()
        for c, matrix in enumerate(kept):
            self.register_buffer(str(c), matrix)

    @torch.no_grad()
    def clear(self, index: int) -> None:
        self._packed()[index].zero_()

    @torch.no_grad()
    def add(self, index: int, products: torch.Tensor) -> None:
        self._add(self.get_buffer(str(index)), products)

    @torch.no_grad()
    def join(self, index: int, other: int) -> None:
        matrices = self._packed()
        matrices[index].add_(matrices[other])
        matrices[other].zero_()

    def counts(self) -> list[float]:
        return torch.stack([m[-1] for m in self._packed()]).tolist()

    def gram(self) -> torch.Tensor:
        with LOCK, torch.inference_mode(False):  # what is kept is added to outside of it too
            return unpacked(self._total(self._packed()))

    def sides(self) -> torch.Tensor:
        return torch.stack([last_column(_mean(m)) for m in self._packed()], 1)

    def holds_infinities(self) -> int:
        return next(c for c, m in enumerate(self._packed()) if not bool(m.isfinite().all()))

    def _packed(self) -> list[torch.Tensor]:
        self.close()
        buffers = (self.get_buffer(str(c)) for c in range(len(self)))
        return [b if b.is_meta else b.cpu() for b in buffers]

    def _total(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of the means. That of all but the last, which training changes, is kept."""
        marks = [(m, -1 if m.is_inference() else m._version) for m in matrices[:-1]]
        known, total = self._older
        first = len(known)
        if total is None or not _begins_with(marks, known):
            first, total = 0, torch.zeros_like(matrices[-1])
        for matrix in matrices[first:-1]:
            total += _mean(matrix)
        self._older = marks, total
        return total + _mean(matrices[-1])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_older": ([], None)}


def _begins_with(marks: Marks, known: Marks) -> bool:
    same = (m is k and v == w != -1 for (m, v), (k, w) in zip(marks, known, strict=False))
    return len(known) <= len(marks) and all(same)


def _mean(matrix: torch.Tensor) -> torch.Tensor:
    count = float(matrix[-1])
    return matrix / count if count > 0 else matrix


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
