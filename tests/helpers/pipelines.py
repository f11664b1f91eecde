"""Passes of a conversion, and running a program with a plan."""

from torch import fx

from moe_rewrite.ir.program import routing_plan
from moe_rewrite.passes.pipeline import TO_CUT, to_experts, to_sites


def all_passes(recipe, router):
    """From a captured graph to one with experts."""
    return (*TO_CUT, *to_sites(recipe), *to_experts(recipe, router))


class Routed(fx.Interpreter):
    """Runs a program with experts by a plan that is given."""

    def __init__(self, program, plan):
        super().__init__(program.root, graph=program.graph)
        self.plan = plan

    def call_function(self, target, args, kwargs):
        return self.plan if target is routing_plan else super().call_function(target, args, kwargs)
