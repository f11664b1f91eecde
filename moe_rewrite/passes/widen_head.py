"""Let a classification head grow: after its product, append the columns that experts added.

Only for a head whose output is the graph's main output (batch, classes); without one the program is
returned unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.utils import _pytree as pytree

from ..analysis.mainline import find_mainline
from ..ir.aten import reach, value
from ..ir.ops import argument, first, op, output_of
from ..ir.program import Program
from ..ir.sites import HeadSite
from ..kernels.head.reference import append_columns
from ..kernels.lora.reference import add_lora_experts
from ..routing.plan_views import ClassGates
from .base import Decisions, Pass
from .split import segments
from .wiring import expert_input, plan_view


@dataclass(frozen=True)
class WidenHead(Pass):
    """Exact while no expert has columns.

    only: name of the head that may be widened; None: any.
    """

    only: str | None = None
    name = "widen head"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        head = _head(program)
        if head is None:
            return program
        graph, inputs = program.graph, dict(program.inputs)
        weight = argument(head, "weight")
        name, width = inputs[weight.name].name, int(value(weight).shape[1])
        site = HeadSite(f"{name.removesuffix('.weight')}.columns", name, width)
        if self.only not in (None, site.name):
            return program
        columns = expert_input(program, inputs, site.name, "columns")
        logits = next((u for u in head.users if u.target is add_lora_experts), head)
        gates = plan_view(program, ClassGates())
        with graph.inserting_after(logits):
            wide = graph.call_function(append_columns, (logits, first(head), columns, gates))
        wide.meta = dict(logits.meta)
        logits.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        return self.done(program, inputs=inputs, head=site)


def _head(program: Program) -> fx.Node | None:
    """The last deep linear map of the main output, if that has its width and no positions."""
    outputs = [n for n in pytree.tree_leaves(output_of(program.graph)) if isinstance(n, fx.Node)]
    if not any(getattr(value(n), "ndim", 0) == 2 for n in outputs):
        return None  # without the mainline, which takes long to find
    sink = find_mainline(program).sink
    _, deep = segments(program)
    used = reach(sink, lambda n: n.all_input_nodes)
    last = next((n for n in reversed(deep) if n in used and op(n).product == "linear"), None)
    if last is None or value(sink).ndim != 2:
        return None
    weight = argument(last, "weight")
    parameter = weight.op == "placeholder" and program.inputs[weight.name].kind == "weight"
    return last if parameter and value(weight).shape[0] == value(sink).shape[1] else None
