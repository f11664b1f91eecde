"""Samples that hold several documents one after the other, as packed training data does.

Shapes: B batch, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError

ALLOWED = -1000.0  # biases of distant positions are above, those of masked ones far below


@dataclass(frozen=True)
class PackedRows:
    """Rows whose attention stops at documents; a gate that averages rows stops there too.

    A document begins at each row that attends to no earlier one, in any layer. A row that attends
    to nothing up to itself does not count.

    tables: which positions each row attends to, as bool or as a bias, (S, S), (B, S, S) or
        (B, heads, S, S), where B and heads may be 1; and whether it does where that is true, or the
        bias is added.
    mask: (B, S), nonzero for rows that count, or None.
    """

    tables: tuple[tuple[torch.Tensor, bool], ...]
    mask: torch.Tensor | None = None

    def starts(self, batch: int) -> torch.Tensor:
        """(B, S) int64, the first position of each row's document."""
        begins = ~self._attends(-1, batch)
        positions = torch.arange(begins.shape[1], device=begins.device)
        return (begins * positions).cummax(1).values

    def counted(self, batch: int) -> torch.Tensor:
        """(B, S) bool."""
        attends = self._attends(0, batch)
        return attends if self.mask is None else attends & (self.mask != 0)

    def require_one_document(self, batch: int, what: str) -> None:
        """Raises InputError if a sample holds more documents than one."""
        counted = self.counted(batch)
        starts = self.starts(batch).masked_fill(~counted, -1)
        first = torch.where(counted, starts, starts.shape[1]).amin(1, keepdim=True)
        if bool((starts > first).any()):
            raise InputError(
                f"{what} takes each sample as one document, and here attention stops within a "
                "sample (packed position_ids, or a block mask): pass documents as samples of their "
                "own, or convert with TokenRouter(granularity='prefix') or granularity='token'"
            )

    def _attends(self, last: int, batch: int) -> torch.Tensor:
        """(B, S) bool: whether each row attends to any up to itself (0) or the one before (-1)."""
        any_layer = None
        for table, attends in self.tables:
            table = table.unsqueeze(0) if table.ndim == 2 else table
            if table.dtype == torch.bool:
                allowed = table if attends else ~table
            else:  # added to scores, or taken off them
                allowed = (table if attends else -table) > ALLOWED
            earlier = allowed.tril(last).any(-1)
            earlier = earlier.any(1) if earlier.ndim == 3 else earlier
            any_layer = earlier if any_layer is None else any_layer | earlier
        assert any_layer is not None
        return any_layer.expand(batch, -1)


RowMask = torch.Tensor | PackedRows | None  # a tensor: (B, S), nonzero for rows that count
