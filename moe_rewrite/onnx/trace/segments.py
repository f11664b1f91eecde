"""The segments of a functional call: functions of named tensors and of earlier segments' values.

A segment is traced by itself, and segments with equal signatures are traced once: the time and the
memory of tracing grow with the largest block, not with the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...routing.dispatch import RowGates
from ...routing.plan import RoutingPlan

LARGE = 150  # most nodes of a merged segment, about those of two transformer blocks
Leaf = torch.Tensor | int | torch.SymInt  # of a value's pytree: a tensor or a size


@dataclass(frozen=True)
class Segment:
    """One segment: ``run(owned, taken)`` returns the values that it gives.

    owned: a pytree of tensor names and of constants, which stand for themselves.
    takes, gives: names of the values that it reads and makes.
    signature: equal for segments that compute the same function of their tensors and values.
    nodes: its size, about.
    writes: indices in `takes` of the values that it writes to.
    calls: numbers of its feed-forward regions, in order.
    drops: names of the values that no later segment reads.
    """

    name: str
    owned: Any
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    run: Callable[[Any, list[Any]], Sequence[Any]]
    signature: Any
    nodes: int
    writes: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    drops: tuple[str, ...] = ()

    @property
    def left(self) -> list[str]:
        """Names of the values that it makes or changes and that are read later."""
        written = [self.takes[i] for i in self.writes]
        return [name for name in (*self.gives, *written) if name not in self.drops]

    def __call__(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Run it on `values`, put what it gives there, and remove what it drops."""
        owned = pytree.tree_map_only(str, tensors.__getitem__, self.owned)
        given = self.run(owned, [values[n] for n in self.takes])
        values.update(zip(self.gives, given, strict=True))
        for name in self.drops:
            values.pop(name, None)


def merge_small(segments: list[Segment], kept: Iterable[str]) -> list[Segment]:
    """The segments to trace. Neighbours with unique signatures are merged up to LARGE nodes, since
    every trace costs time. Each drops the values that it reads last, except those in `kept`."""
    count = Counter(segment.signature for segment in segments)
    made: list[list[Segment]] = []
    for segment in segments:
        small = made and sum(p.nodes for p in (*made[-1], segment)) <= LARGE
        if small and all(count[p.signature] == 1 for p in (made[-1][-1], segment)):
            made[-1].append(segment)
        else:
            made.append([segment])
    return _dropping([_one(neighbours) for neighbours in made], kept)


def as_one_segment(segments: list[Segment], kept: Iterable[str]) -> list[Segment]:
    """All segments merged into one."""
    return _dropping([_one(segments)], kept)


def _one(segments: list[Segment]) -> Segment:
    """A segment that runs these one after the other."""
    if len(segments) == 1:
        return segments[0]
    gives = tuple(name for segment in segments for name in segment.gives)
    takes = tuple(dict.fromkeys(n for segment in segments for n in segment.takes if n not in gives))
    written = {segment.takes[i] for segment in segments for i in segment.writes}

    def run(owned: Any, taken: list[Any]) -> list[Any]:
        values = dict(zip(takes, taken, strict=True))
        for segment, own in zip(segments, owned, strict=True):
            given = segment.run(own, [values[n] for n in segment.takes])
            values.update(zip(segment.gives, given, strict=True))
        return [values[n] for n in gives]

    return Segment(
        f"{segments[0].name}-{segments[-1].name}", tuple(p.owned for p in segments), takes, gives, run,
        object(), sum(p.nodes for p in segments),
        tuple(i for i, name in enumerate(takes) if name in written),
        tuple(number for segment in segments for number in segment.calls),
    )  # fmt: skip


def _dropping(segments: list[Segment], kept: Iterable[str]) -> list[Segment]:
    """The segments with `drops` filled in."""
    needed, made = set(kept), []
    for segment in reversed(segments):
        last = {*segment.takes, *segment.gives} - needed
        made.append(replace(segment, drops=tuple(sorted(last))))
        needed |= {*segment.takes}
    return made[::-1]


def traced_target(node: fx.Node) -> Any:
    """What the trace of a node depends on: its target, or a call's `trace_key`."""
    return getattr(node.target, "trace_key", node.target)


def spread(value: Any) -> tuple[list[Leaf], Callable[[list[Any]], Any]]:
    """The tensors and sizes of a value, and a function that rebuilds the value from others."""
    if isinstance(value, Leaf) and not isinstance(value, bool):
        return [value], lambda given: given[0]
    if isinstance(value, RowGates):
        return [value.gates], lambda given: RowGates(given[0], value.top_k, value.base)
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
