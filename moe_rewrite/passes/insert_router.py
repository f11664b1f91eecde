"""Insert the router: one node at the cut, whose plan is an edge to every deep site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..config import TokenRouter
from ..errors import ConversionError
from ..ir.program import Program, routing_plan
from ..routing.token_gate import reads_other_rows
from .base import Decisions, Pass


@dataclass(frozen=True)
class InsertRouter(Pass):
    """Exact: nothing reads the plan yet."""

    name = "route"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        assert program.cut is not None
        router = decisions.router
        if program.cut.unseen and isinstance(router, TokenRouter) and reads_other_rows(router):
            raise ConversionError(
                f"{', '.join(program.cut.unseen)}: where attention stops within a sample is drawn, or "
                "written in place, after the cut, and gates that read other rows could not stop there: "
                "split later, or convert with TokenRouter(granularity='token')"
            )
        cut = program.node(program.cut.node)
        with program.graph.inserting_after(cut):
            program.graph.call_function(routing_plan, (cut,))
        return self.done(program)


def router_node(program: Program) -> fx.Node:
    return program.graph.find_nodes(op="call_function", target=routing_plan)[0]
