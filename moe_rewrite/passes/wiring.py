"""Nodes that several passes add to a graph: views of the plan, and placeholders of experts."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.aten import identifier
from ..ir.program import Input, Program
from ..routing.plan_views import PlanView, view_plan
from .insert_router import router_node


def plan_view(program: Program, view: PlanView) -> fx.Node:
    """The node of this view of the plan, added if there is none yet."""
    plan = router_node(program)
    given: Any = (plan, view)
    for node in plan.users:
        if node.target is view_plan and node.args == given:
            return node
    with program.graph.inserting_after(plan):
        return program.graph.call_function(view_plan, given)


def expert_input(program: Program, inputs: dict[str, Input], site: str, part: str) -> fx.Node:
    """A placeholder for one part of a site's experts, recorded in `inputs`."""
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        node = program.graph.placeholder(f"expert_{identifier(part)}_{identifier(site)}")
    inputs[node.name] = Input("expert", f"{site}:{part}")
    return node
