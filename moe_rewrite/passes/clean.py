"""Drop what a captured graph carries only for checking: asserts, guards, casts that cast nothing.

Exact: every dropped node hands on its input unchanged. Runs before cut points are sought, so that
none of them is a node that goes. Does not touch random or in-place operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ir.aten import value
from ..ir.program import Program

aten = torch.ops.aten
ASSERTS = {
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
END = 2**62  # torch.export writes "to the end" of a slice as the largest int64


def clean(program: Program) -> Program:
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTS:
            graph.erase_node(node)
        elif _passes_through(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_must_stay)
    inputs = {n.name: program.inputs[n.name] for n in graph.find_nodes(op="placeholder")}
    return program.after("clean", "exact", inputs=inputs)


def _must_stay(node: fx.Node) -> bool:
    return node.op == "placeholder" or node.is_impure()


def _passes_through(node: Any) -> bool:
    """Whether the node returns its first argument itself, or a full view of it."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in CASTS:
        before, after = value(node.args[0]), value(node)
        copies = True in node.args[1:] or node.kwargs.get("copy")
        same = before.dtype == after.dtype and before.device == after.device
        return same and not copies and node.kwargs.get("memory_format") is None
    if node.target in DROPOUTS:
        return node.args[2] is False
    if node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else 0
        end = node.args[3] if len(node.args) > 3 else END
        step = node.args[4] if len(node.args) > 4 else 1
        whole = isinstance(end, int) and end >= END
        return whole and step == 1 and (start is None or start == 0)
    return False
