"""Insert LoRA experts: after each site's product, add the gated low-rank delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..analysis.stacked_products import RowDims, Stacked
from ..config import LoRAExperts
from ..experts.lora.grouped_call import GroupedLoRACall
from ..experts.lora.stacked_call import StackedLoRACall
from ..ir.aten import value
from ..ir.program import Program
from ..kernels.lora.reference import add_conv_lora_experts, add_lora_experts
from ..routing.plan_views import ScaledGates
from .base import Decisions, Pass, sites_to_convert
from .find_lora_sites import Match
from .wiring import expert_input, plan_view


@dataclass(frozen=True)
class InsertLoRA(Pass):
    """Exact while the experts' B is zero: the product itself is not changed."""

    experts: LoRAExperts
    name = "insert experts"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        sites, inputs = sites_to_convert(program, decisions), dict(program.inputs)
        views = dict.fromkeys(self._view(use) for uses in sites.values() for use in uses)
        gates = {view: plan_view(program, view) for view in reversed(views)}
        added: dict[fx.Node, fx.Node] = {}  # product -> its sum with the experts
        for site, uses in sites.items():
            parts = [expert_input(program, inputs, site.name, part) for part in ("a", "b")]
            for use in uses:
                with program.graph.inserting_after(use.node):
                    rows = added.get(use.rows, use.rows)  # it may read another site's product
                    scales = gates[self._view(use)]
                    given: Any = (use.node, rows, scales, *parts, *use.options)
                    add: Any = add_conv_lora_experts if site.kernel else add_lora_experts
                    if use.groups is not None:
                        add = GroupedLoRACall(use.node.target)
                        given = (*given, use.groups.index, use.groups.ends)
                    elif use.stacked is not None and use.of is not None:
                        add = _stacked(use.stacked, use.of)
                        given = (*given, use.stacked.index, use.of.take)
                    routed = program.graph.call_function(add, given)
                routed.meta = dict(use.node.meta)
                use.node.replace_all_uses_with(
                    routed, delete_user_cb=lambda user, routed=routed: user is not routed
                )
                added[use.node] = routed
        return self.done(program, inputs=inputs, sites=tuple(sites), found=None)

    def _view(self, use: Match) -> ScaledGates:
        dtype = value(use.rows).dtype
        return ScaledGates(use.layout, dtype, self.experts.rank, self.experts.scale)


def _stacked(how: Stacked, of: RowDims) -> StackedLoRACall:
    rows = "".join(how.given[d] for d in of.dims)
    return StackedLoRACall(how.given, how.inside, how.outside, how.group, how.made, rows)
