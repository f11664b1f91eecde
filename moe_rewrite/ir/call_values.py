"""Numbers that a model's code reads off the tensors of a call, to branch on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:  # importing it takes longer than all the rest
    import sympy


@dataclass(frozen=True, eq=False)
class CallValue:
    """A number that is computed from a call's tensors alone, as in ``if mask.any():``.

    symbol: stands for it in relations; torch.export's own.
    leaves: those of the call that the code takes, by number.
    code: computes it; writes to nothing that it is given.
    words: where the model's code reads it.
    is_bool: it is 0 or 1.
    """

    symbol: sympy.Symbol
    leaves: tuple[int, ...]
    code: fx.GraphModule
    words: str
    is_bool: bool = False

    @torch.no_grad()
    def of(self, leaves: Any) -> int | float:
        """The number for these leaves of a call. A bool counts as 0 or 1."""
        found = self.code(*(leaves[i] for i in self.leaves))
        return int(found) if isinstance(found, bool) else found
