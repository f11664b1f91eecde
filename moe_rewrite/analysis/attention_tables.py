"""The values that say where attention stops within a sample, as between packed documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, reach, value
from ..ir.dependencies import needed_for
from ..ir.ops import argument, op, op_name
from ..ir.program import Program, Table, lead_of
from .static_values import made_of_weights

LOW = -1000.0  # scores are replaced by a value below this where a row does not attend


def attention_tables(program: Program, cut: fx.Node, mask: str | None) -> tuple[Table, ...]:
    """The values that say of each pair of rows whether one attends to the other, and follow from
    what a call says of its rows: position_ids, segments, padding in the ids, a mask of pairs.

    mask: the input (B, S) that masks rows; tables that depend on it alone are left out.
    """
    lead = lead_of(value(cut).shape)
    if len(lead) < 2:
        return ()
    length = expression(lead[1])
    of_weights = made_of_weights(program)
    found: dict[str, Table] = {}
    for leaf in program.leaves():
        if leaf.name == mask or not _describes_rows(leaf, length):
            continue
        for node in reach(leaf, _by_content) - of_weights:
            allowed = _used_as(node, of_weights) if _is_of_pairs(node, length) else None
            if allowed is not None:
                found[node.name] = Table(node.name, allowed)
    return tuple(found[n.name] for n in program.graph.nodes if n.name in found)


def _by_content(node: fx.Node) -> Iterator[fx.Node]:
    """The users of a value that read more of it than its sizes."""
    return (user for user in node.users if not op(user).sizes_only)


def made_of(program: Program, tables: Iterable[Table]) -> Iterator[fx.Node]:
    """The operations that tables are made of, in order."""
    needed = needed_for(program.node(t.node) for t in tables)
    return (n for n in needed if n.op != "placeholder")


def _used_as(node: fx.Node, of_weights: set[fx.Node]) -> bool | None:
    """Whether rows attend where the table is true, or where it is false; None if scores do not
    depend on it in a way that is known."""
    for user in (u for u in node.users if u in of_weights and hasattr(u.target, "_schema")):
        name = op_name(user)
        if name == "scaled_dot_product_attention" and argument(user, "attn_mask") is node:
            return True
        if name in ("add", "sub") and value(node).is_floating_point():  # a bias
            return name == "add" or argument(user, "other") is not node
        if name == "baddbmm" and argument(user, "self") is node:
            return True
        if name == "masked_fill" and _is_low(argument(user, "value")):
            return False
        if name == "where" and argument(user, "condition") is node:
            low = [_is_low(argument(user, n)) for n in ("self", "other")]
            if any(low):
                return not low[0]
    return None


def _is_low(given: Any) -> bool:
    """Whether it is a number that no score has, or a tensor of such numbers."""
    if isinstance(given, fx.Node) and given.op == "call_function":
        numbers = [a for a in given.args if isinstance(a, (int, float))]
        given = min(numbers, default=None)
    return isinstance(given, (int, float)) and given < LOW


def _describes_rows(leaf: fx.Node, length: Any) -> bool:
    """Whether an input has one whole number for each row, or a value for each pair of rows."""
    given = value(leaf)
    if _is_of_pairs(leaf, length):
        return True
    return (
        given.ndim == 2 and not given.is_floating_point() and expression(given.shape[1]) == length
    )


def _is_of_pairs(node: fx.Node, length: Any) -> bool:
    made = value(node)
    if not isinstance(made, torch.Tensor) or made.ndim not in (2, 3, 4):
        return False
    pairs = all(expression(size) == length for size in made.shape[-2:])
    return pairs and (made.dtype == torch.bool or made.is_floating_point())
