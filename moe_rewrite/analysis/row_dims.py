"""The rows of a value, identified by their symbolic sizes, and the input that they come from.

Sizes are compared by expression: no guard is added, and the example's values play no role.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir.aten import expression, reach, value
from ..ir.ops import first, is_pointwise, op
from ..ir.program import Program, lead_of
from .line_rows import Along, line_rows


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        expression(x) == expression(y) for x, y in zip(a, b, strict=True)
    )


def source_of_rows(program: Program, node: fx.Node) -> str | None:
    """The user's input whose positions are this value's rows (``input_ids``, for example)."""
    lead = lead_of(value(node).shape)
    if len(lead) < 2:
        return None
    upstream = reach(node, lambda n: n.all_input_nodes)
    for leaf in program.leaves():
        known = leaf in upstream and "mask" not in leaf.name
        if known and same_sizes(value(leaf).shape[:2], lead):
            return leaf.name
    return None


def is_positions_first(program: Program, node: fx.Node) -> bool:
    """Whether the samples, which are first in the user's inputs, are second in a value (S, B, D).
    Numbers may coincide: where the sizes are some, the samples are followed from the inputs on."""
    if value(node).ndim != 3:
        return False
    length, batch = map(expression, value(node).shape[:2])
    upstream = reach(node, lambda n: n.all_input_nodes)
    leaves = [n for n in program.leaves() if n in upstream and value(n).ndim > 1]
    pairs = {tuple(map(expression, value(n).shape[:2])) for n in leaves}
    firsts = {first for first, _ in pairs}
    if isinstance(batch, int):
        nodes = [n for n in program.graph.nodes if n in upstream]
        laid = [line_rows(nodes, leaf, dim=0).get(node) for leaf in leaves]
        return any(isinstance(at, Along) and at.dim == 1 for at in laid)
    if (length, batch) in pairs or batch not in firsts:
        return False
    return (batch, length) in pairs or length not in firsts


def mask_of_rows(program: Program, source: str | None) -> str | None:
    """The user's input (B, S) that masks these rows, by Hugging Face's names."""
    wanted = "decoder_attention_mask" if (source or "").startswith("decoder_") else "attention_mask"
    names = {leaf.name for leaf in program.leaves() if value(leaf).ndim == 2}
    return wanted if source is not None and wanted in names else None


def flattened_from(node: fx.Node) -> fx.Node | None:
    """The value whose two leading dimensions were merged, in order, into this one's rows."""
    while node.op == "call_function":
        if op(node).rows == "merged":
            node = first(node)
            if value(node).ndim > 2:
                return node
            continue
        if op(node).rows != "kept" and not is_pointwise(node):
            return None
        rows = value(node).shape[:1]
        sources = [
            n for n in node.all_input_nodes
            if isinstance(value(n), torch.Tensor) and value(n).ndim == value(node).ndim
            and n.op != "placeholder" and same_sizes(value(n).shape[:1], rows)
        ]  # fmt: skip
        if not sources:
            return None
        node = sources[0]
    return None
