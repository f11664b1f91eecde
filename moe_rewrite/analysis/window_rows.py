"""Rows inside windows of a map or of a sequence, followed exactly through views, permutations,
rolls, padding and slices (window partition, shifted windows).

A table says of each row of a value, for one sample, which position of the map it is; -1 for what
pads it. Tables are found forward, from a map on, and backward, for values (an attention's output)
whose rows come to lie where they are added to a map.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, is_pointwise, op, op_name, takes
from .map_layout import moved_order
from .spatial import axis, padding_of

BATCHES = (1, 2, 3, 7)  # at which sizes are compared


@dataclass(frozen=True)
class Windows:
    """base: (H, W) of the map that the table points into; () for rows of a sequence.
    table: (m, ...) int64, for a value (B * m, ..., features)."""

    base: tuple[int, ...]
    table: torch.Tensor


class WindowRows:
    """Tables of the values of a graph's nodes.

    start: the map or the sequence that a value is, if it is one and nothing else tells.
    batch: size of the batch.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], start: Callable[[fx.Node], Windows | None], batch: Any
    ) -> None:
        self.nodes, self.start, self.batch = nodes, start, expression(batch)

    @cached_property
    def known(self) -> dict[fx.Node, Windows]:
        """Forward, in the order of the graph."""
        known: dict[fx.Node, Windows] = {}
        for node in self.nodes:
            found = self._made(node, known) or self.start(node)
            if found is not None:
                known[node] = found
        return known

    def of(self, rows: fx.Node, made: fx.Node) -> Windows | None:
        """The table of a product's input, by what it was made of or by what becomes of it."""
        return self.known.get(rows) or self._backward(made)

    def _made(self, node: fx.Node, known: dict[fx.Node, Windows]) -> Windows | None:
        """What all operands with a table agree on."""
        found = [
            Windows(known[s].base, table)
            for s in node.all_input_nodes
            if s in known and (table := self.step(node, s, known[s].table)) is not None
        ]
        alike = all(w.base == found[0].base and torch.equal(w.table, found[0].table) for w in found)
        return found[0] if found and alike else None

    def _backward(self, node: fx.Node) -> Windows | None:
        """Number the rows, and follow the numbers to a value whose table is known."""
        lead = self.lead_of(node)
        if lead is None:
            return None
        numbers = torch.arange(lead.numel()).view(lead)
        while len(node.users) == 1:
            (user,) = node.users
            others = [self.known.get(s) for s in user.all_input_nodes if s is not node]
            # a factor for each sample (stochastic depth) tells nothing
            whole = next((w for w in others if w and w.table.shape == numbers.shape), None)
            if whole is not None and is_pointwise(user):
                return _inverse(whole, numbers, lead)
            found = self.step(user, node, numbers)
            if found is None:
                return None
            node, numbers = user, found
        return None

    def lead_of(self, node: fx.Node) -> torch.Size | None:
        """Sizes of the rows of one sample: (m, ...) of a value (B * m, ..., features)."""
        made = value(node)
        if not isinstance(made, torch.Tensor) or made.ndim < 2:
            return None
        whole, *rest = map(expression, made.shape[:-1])
        times = [_at(whole, self.batch, n) for n in BATCHES]
        per = times[0] if isinstance(times[0], int) else 0
        fits = per > 0 and times == [per * n for n in BATCHES]
        return torch.Size([per, *rest]) if fits and all(isinstance(s, int) for s in rest) else None

    def step(self, node: fx.Node, source: fx.Node, table: torch.Tensor) -> torch.Tensor | None:
        """The table after an operation that moves rows, or leaves them; None after any other."""
        lead = self.lead_of(node)
        last = value(source).ndim - 1 if isinstance(value(source), torch.Tensor) else -1
        if node.target is operator.getitem:
            return table
        if op(node).positions == "split":
            return table if axis(node) == last else None
        if lead is None or last < 1:
            return None
        if is_pointwise(node) or op(node).positions == "features" or op(node).product == "linear":
            return table if lead == table.shape else None
        if op(node).view:
            whole = expression(value(node).shape[-1]) == expression(value(source).shape[-1])
            return table.reshape(lead) if whole and lead.numel() == table.numel() else None
        moved = _moved(node, table, last)
        return moved if moved is not None and moved.shape == lead else None


def _moved(node: fx.Node, table: torch.Tensor, last: int) -> torch.Tensor | None:
    if op(node).transposes:
        order = moved_order(node)
        return table.permute(order[:-1]) if order[0] == 0 and order[-1] == last else None
    kind, name = op(node).positions, op_name(node)
    if name == "roll":
        dims = [d % (last + 1) for d in argument(node, "dims")]
        if not dims or {0, last} & set(dims):
            return None
        return table.roll(argument(node, "shifts"), dims)
    if kind == "slice":
        dim, given = axis(node), [argument(node, name) for name in ("start", "end", "step")]
        if dim in (0, last):  # of the batch, a part would have another size
            return table
        fixed = all(isinstance(s, int | None) for s in given)
        return table[(slice(None),) * dim + (slice(*given),)] if fixed else None
    if kind == "pad" and not (takes(node, "mode") and argument(node, "mode") != "constant"):
        pads = padding_of(node)
        if any(pads[:2]) or len(pads) > 2 * last:
            return None
        return F.pad(table, pads[2:], value=-1)
    if kind == "cat":
        return table if axis(node) == last else None
    return None


def _inverse(whole: Windows, numbers: torch.Tensor, lead: torch.Size) -> Windows:
    table = torch.full((lead.numel(),), -1)
    kept = numbers.flatten() >= 0
    table[numbers.flatten()[kept]] = whole.table.flatten()[kept]
    return Windows(whole.base, table.view(lead))


def _at(size: Any, batch: Any, count: int) -> Any:
    """A size where the batch has this many samples; None if it depends on anything else."""
    if isinstance(batch, int):  # a constant of the trace: sizes are multiples of it
        fits = isinstance(size, int) and batch and size % batch == 0
        return size // batch * count if fits else None
    made = size.subs(batch, count) if hasattr(size, "subs") else size
    try:
        return int(made)
    except TypeError:
        return None
