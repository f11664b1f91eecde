"""What was made of parameters in the latest call of inference, kept until one of them changes: for one
token, making it anew would take longer than the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sharded import is_sharded, is_traced

Tables = tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Latest:
    """A value, the experts that it was made for, and the parameters that it was made of.

    tables: `_parameters` of lists with one parameter an expert: without the way through nn.Module's
        attributes, which takes microseconds.
    parameters: of each table, (name in it, itself, version, address) of the experts' parameters.
    """

    active: Sequence[int]
    tables: Tables
    parameters: tuple[tuple[tuple[str, Any, int, int], ...], ...]
    value: Any

    @classmethod
    def of(cls, tables: Tables, active: Sequence[int], value: Any) -> Latest | None:
        """None where a parameter's changes are not known by its version."""
        own = [[(str(e), table[str(e)]) for e in active] for table in tables]
        whole = (p for part in own for _, p in part)
        if any(is_sharded(p) or is_traced(p) or p.is_inference() for p in whole):
            return None
        known = (tuple((n, t, t._version, t.data_ptr()) for n, t in part) for part in own)
        return cls(tuple(active), tables, tuple(known), value)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a model makes its own: views made without gradients cannot be copied."""

    def serves(self, tables: Tables, active: Sequence[int]) -> bool:
        if active != self.active:
            return False
        for now, table, part in zip(tables, self.tables, self.parameters, strict=True):
            if now is not table:
                return False
            for name, parameter, version, address in part:
                if (
                    parameter.is_inference()  # moved there since; it counts no versions
                    or parameter._version != version
                    or parameter.data_ptr() != address
                    or table.get(name) is not parameter
                ):
                    return False
        return True
