"""A kind of experts from outside of the package: each adds a vector to what a linear map gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_rewrite import LoRAExperts
from moe_rewrite.experts.base import ExpertParameters
from moe_rewrite.ir.aten import value
from moe_rewrite.passes.base import Pass, sites_to_convert
from moe_rewrite.passes.find_lora_sites import FindLoRASites
from moe_rewrite.passes.kinds import ExpertKind
from moe_rewrite.passes.wiring import expert_input, plan_view
from moe_rewrite.routing.plan_views import ScaledGates


@dataclass(frozen=True)
class BiasExperts:
    """sites: endings of the names of linear maps."""

    sites: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "sites", tuple(self.sites))  # JSON gives a list


def add_bias_experts(out, scales, biases):
    """out: (..., O). scales: (..., E) gates. biases: (E, O)."""
    return out + scales @ biases


class BiasParameters(ExpertParameters):
    """bias[e]: (out,), zero at the start."""

    parts = ("bias",)

    def __init__(self, site):
        super().__init__()
        self.site, self.bias = site, nn.ParameterList()

    def add(self, dense):
        like = dense[self.site.weight]
        self.bias.append(nn.Parameter(like.new_zeros(self.site.out_features)))
        return [self.bias[-1]]

    def parameter_lists(self):
        return [list(self.bias)]

    def remove_last(self):
        self.bias = self.bias[:-1]

    def stacked(self, active: Sequence[int]):
        if not active:
            return (self.bias[0].new_empty(0, self.site.out_features),)
        return (torch.stack([self.bias[e] for e in active]),)

    def expert_dim(self, part):
        return 0, 1


@dataclass(frozen=True)
class InsertBias(Pass):
    """Exact while biases are zero."""

    name = "insert experts"

    def apply(self, program, decisions):
        sites, inputs = sites_to_convert(program, decisions), dict(program.inputs)
        for site, uses in sites.items():
            bias = expert_input(program, inputs, site.name, "bias")
            for use in uses:
                gates = plan_view(program, ScaledGates(use.layout, value(use.rows).dtype, 1, 1.0))
                with program.graph.inserting_after(use.node):
                    added = program.graph.call_function(add_bias_experts, (use.node, gates, bias))
                added.meta = dict(use.node.meta)
                use.node.replace_all_uses_with(
                    added, delete_user_cb=lambda user, added=added: user is not added
                )
        return self.done(program, inputs=inputs, sites=tuple(sites), found=None)


class BiasKind(ExpertKind):
    spec = BiasExperts
    onnx = ("dense", "one product with the gates")

    def find(self, recipe):
        return FindLoRASites(LoRAExperts(sites=recipe.experts.sites))

    def insert(self, recipe, router):
        return InsertBias()

    def parameters(self, site, recipe):
        return BiasParameters(site)

    def words(self, recipe):
        return "a bias an expert"
