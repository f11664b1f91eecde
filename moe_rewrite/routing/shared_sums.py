"""The sums from which an analytic router is solved, in memory that does not grow with the experts.

Shapes: M random features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, InputError
from .packed_sums import LOCK, PackedSums, last_column, unpacked


class SharedSums(PackedSums):
    """Three packed matrices, whatever the number of classes, and M + 1 numbers for each class.

    columns: (classes, M + 1), the sum of f over each class's rows, the number of rows last.
    base: sum of f f^T over the rows of class 0, the frozen model.
    own: the same of the class that rows were added to last, number `open`, -1 for none.
    folded: the sum, over the classes with rows before that one, of their mean f f^T.
    left: (M + 1,), the sum of the mean f of classes that were dropped after they had been folded.

    A class is folded when rows of another one come, and takes no more rows from then on. Dropping it
    leaves its rows in `folded`, as rows of the frozen model: with them the router is the least-squares
    solution in which these rows have the frozen model's target.
    """

    columns: torch.Tensor
    base: torch.Tensor
    own: torch.Tensor
    folded: torch.Tensor
    left: torch.Tensor
    open: torch.Tensor

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size)
        for name in ("base", "own", "folded"):
            self.register_buffer(name, self._zeros(device))
        self.register_buffer("left", self._zeros(device, size))
        self.register_buffer("columns", self._zeros(device, 0, size))
        self.register_buffer("open", torch.tensor(-1))

    def __len__(self) -> int:
        return len(self.columns)

    def append(self, device: torch.device) -> None:
        self.columns = torch.cat([self.columns, self._zeros(self.columns.device, 1, self.size)])

    @torch.no_grad()
    def drop(self, index: int) -> None:
        self.close()
        number = int(self.open)
        if index == number:
            self.own.zero_()
            self.open.fill_(-1)
        elif self._count(index) > 0:
            self.left += self.columns[index] / self._count(index)
        if index < number:
            self.open -= 1
        self.columns = torch.cat([self.columns[:index], self.columns[index + 1 :]])

    @torch.no_grad()
    def clear(self, index: int) -> None:
        self.require_open(index)
        self.close()
        if index in (0, int(self.open)):
            self._matrix(index).zero_()
        self.columns[index].zero_()

    def require_open(self, index: int) -> None:
        self.close()
        if index not in (0, int(self.open)) and self._count(index) > 0:
            raise ConfigError(
                f"expert {index - 1} has its rows in the sums, and rows of another one came since: "
                "sums='shared' keeps no matrix of its own for it, to which more rows could be added. "
                "Pass all samples of an expert before those of the next, or convert with "
                "TokenRouter(sums='each')"
            )

    @torch.no_grad()
    def add(self, index: int, products: torch.Tensor) -> None:
        with LOCK:
            if index not in (0, int(self.open)):
                self.require_open(index)
                self._fold()
                self.open.fill_(index)
            self._add(self._matrix(index), products)

    def join(self, index: int, other: int) -> None:
        raise ConfigError(
            "join_experts: with sums='shared' the router keeps no matrix of each expert, by whose "
            "number of rows the joined one would weigh: convert with TokenRouter(sums='each')"
        )

    def _fold(self) -> None:
        if not self.own.is_meta and not bool(self.own.isfinite().all()):
            raise InputError(
                f"the sums of expert {int(self.open) - 1}'s rows hold infinities or NaN: give it its "
                f"samples by moe.fit_router({int(self.open) - 1}, batches) before others"
            )
        self.folded += _mean(self.own)
        self.own.zero_()

    def _matrix(self, index: int) -> torch.Tensor:
        return self.base if index == 0 else self.own

    @torch.no_grad()
    def close(self) -> None:
        with LOCK:
            if self._open is not None:
                super().close()
                self.columns[0] = last_column(self.base)
                if int(self.open) > 0:
                    self.columns[int(self.open)] = last_column(self.own)

    def _count(self, index: int) -> float:
        return 0.0 if self.columns.is_meta else float(self.columns[index, -1])

    def counts(self) -> list[float]:
        self.close()
        return self.columns[:, -1].tolist()

    def gram(self) -> torch.Tensor:
        with LOCK:
            self.close()
            return unpacked(self.folded + _mean(self.base) + _mean(self.own)).cpu()

    def sides(self) -> torch.Tensor:
        self.close()
        means = self.columns / self.columns[:, -1:].clamp_min(1)
        means[0] += self.left
        return means.T.cpu()

    def holds_infinities(self) -> int:
        self.close()
        odd = ~self.columns.isfinite().all(1)
        return int(odd.nonzero()[0]) if bool(odd.any()) else int(self.open)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        number = self.open
        super()._apply(fn, recurse)
        self.open = number  # read by Python, as the flags of experts are
        return self


def _mean(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix[-1].clamp_min(1)
