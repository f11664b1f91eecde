"""Let a classification head grow: behind its product, append the columns that experts brought.

Exact while no expert has columns. Only heads that the graph's main output (batch, classes) comes
from; without one the program is handed back unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..analysis.mainline import find_mainline
from ..ir.aten import value
from ..ir.gate_layout import Layout
from ..ir.program import Input, Program
from ..ir.sites import HeadSite
from ..kernels.head.reference import append_columns
from ..kernels.lora.reference import add_lora_experts
from ..routing.plan import align
from .insert_router import router_node
from .split import segments

linear = torch.ops.aten.linear.default


def widen_head(program: Program) -> Program:
    head = _head(program)
    if head is None:
        return program
    graph, inputs = program.graph, dict(program.inputs)
    weight: Any = head.args[1]
    name = inputs[weight.name].name
    site = HeadSite(f"{name.removesuffix('.weight')}.columns", name, int(value(weight).shape[1]))
    with graph.inserting_before(next(iter(graph.nodes))):
        columns = graph.placeholder("expert_columns")
    inputs[columns.name] = Input("expert", f"{site.name}:columns")
    logits = next((u for u in head.users if u.target is add_lora_experts), head)
    layout: Any = Layout("head", 2, value(logits).dtype)
    with graph.inserting_after(router_node(program)):
        gates = graph.call_function(align, (router_node(program), layout))
    with graph.inserting_after(logits):
        wide = graph.call_function(append_columns, (logits, head.args[0], columns, gates))
    wide.meta = dict(logits.meta)
    logits.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    return program.after("widen_head", "exact", inputs=inputs, sites=(*program.sites, site))


def _head(program: Program) -> fx.Node | None:
    """The last deep linear map, if the main output has its width and no positions."""
    sink = value(find_mainline(program, "the model").sink)
    _, deep = segments(program)
    last = next((n for n in reversed(deep) if n.target is linear), None)
    if last is None or sink.ndim != 2:
        return None
    weight: Any = last.args[1]
    parameter = weight.op == "placeholder" and program.inputs[weight.name].kind == "weight"
    return last if parameter and value(weight).shape[0] == sink.shape[1] else None
