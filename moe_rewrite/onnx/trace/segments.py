"""The parts of a plain call: functions of tensors by name and of values that earlier parts gave.

A part is traced alone, and parts that are alike are traced once: what a trace takes, in time and
memory, is of the largest block, and not of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...experts.lora.call import LoRACall
from ...routing.dispatch import RowGates
from ...routing.plan import RoutingPlan
from .ffn_placeholder import TracedFeedForward

LARGE = 150  # nodes of a part, about those of two blocks of a transformer
Leaf = torch.Tensor | int | torch.SymInt  # of a value: a tensor, or a size


@dataclass(frozen=True)
class Part:
    """run(owned, taken) -> given. owned: a pytree with names of tensors, and constants as they are.
    takes, gives: names of values. drops: of those that nothing behind it reads. writes: places in
    `taken` that it writes to. calls: numbers of its feed-forward regions, in order. alike: equal
    for parts that compute the same of their tensors and values. nodes: how large it is, about."""

    name: str
    owned: Any
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    run: Callable[[Any, list[Any]], Sequence[Any]]
    alike: Any
    nodes: int
    writes: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    drops: tuple[str, ...] = ()

    @property
    def left(self) -> list[str]:
        """Names of the values that it makes or changes and that something reads behind it."""
        written = [self.takes[i] for i in self.writes]
        return [name for name in (*self.gives, *written) if name not in self.drops]

    def __call__(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put what it gives into `values`."""
        owned = pytree.tree_map_only(str, tensors.__getitem__, self.owned)
        given = self.run(owned, [values[n] for n in self.takes])
        values.update(zip(self.gives, given, strict=True))
        for name in self.drops:
            values.pop(name, None)


def arranged(parts: list[Part], kept: Iterable[str]) -> list[Part]:
    """The parts as they are traced: neighbours that no other part is like are one up to a size, for
    a trace takes some time at any; each with what it is the last to read, but for what is kept."""
    count = Counter(part.alike for part in parts)
    made: list[list[Part]] = []
    for part in parts:
        small = made and sum(p.nodes for p in (*made[-1], part)) <= LARGE
        if small and all(count[p.alike] == 1 for p in (made[-1][-1], part)):
            made[-1].append(part)
        else:
            made.append([part])
    return _dropping([_one(neighbours) for neighbours in made], kept)


def whole(parts: list[Part], kept: Iterable[str]) -> list[Part]:
    """The parts as one."""
    return _dropping([_one(parts)], kept)


def _one(parts: list[Part]) -> Part:
    """A part that does what these do one after the other."""
    if len(parts) == 1:
        return parts[0]
    gives = tuple(name for part in parts for name in part.gives)
    takes = tuple(dict.fromkeys(n for part in parts for n in part.takes if n not in gives))
    written = {part.takes[i] for part in parts for i in part.writes}

    def run(owned: Any, taken: list[Any]) -> list[Any]:
        values = dict(zip(takes, taken, strict=True))
        for part, own in zip(parts, owned, strict=True):
            given = part.run(own, [values[n] for n in part.takes])
            values.update(zip(part.gives, given, strict=True))
        return [values[n] for n in gives]

    return Part(
        f"{parts[0].name}-{parts[-1].name}", tuple(p.owned for p in parts), takes, gives, run,
        object(), sum(p.nodes for p in parts),
        tuple(i for i, name in enumerate(takes) if name in written),
        tuple(number for part in parts for number in part.calls),
    )  # fmt: skip


def _dropping(parts: list[Part], kept: Iterable[str]) -> list[Part]:
    needed, made = set(kept), []
    for part in reversed(parts):
        last = {*part.takes, *part.gives} - needed
        made.append(replace(part, drops=tuple(sorted(last))))
        needed |= {*part.takes}
    return made[::-1]


def traced_target(node: fx.Node) -> Any:
    """In the place of a call by its site, what a trace of it depends on."""
    if isinstance(node.target, TracedFeedForward):
        return TracedFeedForward, node.target.channels, node.target.dims
    return LoRACall if isinstance(node.target, LoRACall) else node.target


def spread(value: Any) -> tuple[list[Leaf], Callable[[list[Any]], Any]]:
    """The tensors and sizes of a value, and what makes it of others."""
    if isinstance(value, Leaf) and not isinstance(value, bool):
        return [value], lambda given: given[0]
    if isinstance(value, RowGates):
        return [value.gates], lambda given: RowGates(given[0], value.per_row, value.base)
    if isinstance(value, RoutingPlan):
        names = [f.name for f in fields(value) if isinstance(getattr(value, f.name), torch.Tensor)]
        tensors = [getattr(value, n) for n in names]

        def plan(given: list[Any]) -> RoutingPlan:
            named = dict(zip(names, given, strict=False))
            return replace(value, rows=tuple(given[len(names) :]), **named)

        return [*tensors, *value.rows], plan
    if isinstance(value, (list, tuple)):
        spreads = [spread(v) for v in value]
        counts = [len(leaves) for leaves, _ in spreads]

        def several(given: list[Any]) -> Any:
            left = iter(given)
            return type(value)(
                make([next(left) for _ in range(count)])
                for count, (_, make) in zip(counts, spreads, strict=True)
            )

        return [leaf for leaves, _ in spreads for leaf in leaves], several
    return [], lambda given: value
