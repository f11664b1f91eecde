"""Inserting LoRA experts: the delta that is added, where, and that products stay as they are."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
import torch.nn.functional as F
from pipelines import Routed
from torch import nn

from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.errors import CaptureError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import op
from moe_rewrite.ir.sites import Rejection
from moe_rewrite.kernels.lora.reference import add_conv_lora_experts, add_lora_experts
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.find_lora_sites import FindLoRASites
from moe_rewrite.passes.insert_lora import InsertLoRA
from moe_rewrite.passes.insert_router import InsertRouter
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.routing.plan import RoutingPlan

EXPERTS = LoRAExperts(rank=2, alpha=3.0)
EACH = Decisions(1, TokenRouter())
SAMPLES = Decisions(1, TokenRouter(granularity="sequence"))


@cache
def cut(model, example):
    return run(TO_CUT, program_of(model, example), Decisions(1))


def found(model, example, decisions):
    program = replace(cut(model, example), graph=copy.deepcopy(cut(model, example).graph))
    return run((FindLoRASites(EXPERTS),), program, decisions)


def routed(model, example, decisions=EACH):
    """The program before its experts and after."""
    inserted = run(
        (InsertRouter(), InsertLoRA(EXPERTS)), found(model, example, decisions), decisions
    )
    return found(model, example, decisions), inserted


def outputs(program, model, x, experts, plan):
    tensors = model.state_dict() | program.constants | experts
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    given = [x if i.kind == "user" else tensors[i.name] for i in inputs]
    with torch.no_grad():
        (y,) = Routed(program, plan).run(*given)
    return y


def plan(*rows, experts=3):
    gates = torch.rand(*rows, 1 + experts).softmax(-1)
    return RoutingPlan(tuple(range(experts)), gates[..., 1:], gates[..., :1], experts, rows)


def stacks(program, experts=3, zero=False):
    """Of each site, its experts' factors."""
    torch.manual_seed(1)
    made = {}
    for site in program.sites:
        made[f"{site.name}:a"] = torch.randn(experts * 2, site.in_features, *site.kernel)
        b = torch.randn(site.out_features, experts * 2, *(1 for _ in site.kernel))
        made[f"{site.name}:b"] = b * (0 if zero else 1)
    return made


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = [(3, 4, 3, 1, 1), (4, 4, 3, 2, 1), (4, 6, 3, 1, 2, 2)]
        self.layers = nn.ModuleList(nn.Conv2d(*s) for s in sizes)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


NETS = {
    name: (networks.Network(["Mlp", *layers], tokens=False).eval(), torch.zeros(2, 6, 5), EACH)
    for name, layers in {
        "plain": ["Mlp", "Branches"], "parameters": ["Bare"], "turned": ["Swapped", "Stacked"],
        "shared": ["Mlp", 0, 1],
    }.items()
} | {"maps": (Maps().eval(), torch.zeros(2, 3, 8, 8), SAMPLES)}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch", [1, 4])
def test_while_b_is_zero_it_computes_the_same_bit_for_bit(name, batch):
    model, example, decisions = NETS[name]
    before, after = routed(model, example, decisions)
    x = torch.randn(batch, *example.shape[1:])
    rows = (batch,) if x.ndim == 4 else x.shape[:2]
    y = outputs(after, model, x, stacks(after, zero=True), plan(*rows))
    assert torch.equal(y, outputs(before, model, x, {}, None))
    assert after.numerics[-1] == ("insert experts", "exact")


@pytest.mark.parametrize("name", NETS)
def test_each_use_of_a_site_gets_its_delta_and_no_product_changes(name):
    model, example, decisions = NETS[name]
    before, after = routed(model, example, decisions)
    added = [n for n in after.graph.nodes if n.target in (add_lora_experts, add_conv_lora_experts)]
    assert len(added) == sum(map(len, before.found.sites.values())) > 0
    products = [(n.target, len(n.args)) for n in before.graph.nodes if op(n).product]
    assert products == [(n.target, len(n.args)) for n in after.graph.nodes if op(n).product]
    for node in added:
        product, *_ = node.args
        assert op(product).product and node.meta["val"] is product.meta["val"]
    names = {f"{site.name}:{part}" for site in after.sites for part in "ab"}
    assert after.names("expert") == names and after.found is None
    assert set(after.sites) == set(before.found.sites)


def test_the_delta_is_the_gated_low_rank_product():
    """Of both products of an MLP, by the definition."""
    model, example, _ = NETS["plain"]
    mlp, branches = model.layers[1:]
    _, after = routed(model, example)
    x, made = torch.randn(3, 4, 5), plan(3, 4)
    parts = stacks(after)

    def linear(x, module, name):
        y = module(x)
        for e in range(3):
            a, b = parts[f"{name}:a"][2 * e : 2 * e + 2], parts[f"{name}:b"][:, 2 * e : 2 * e + 2]
            y = y + made.weights[..., e : e + 1] * 1.5 * (x @ a.T @ b.T)
        return y

    with torch.no_grad():
        h = model.layers[0](model.embed(x))
        hidden = F.gelu(linear(mlp.norm(h), mlp.up, "layers.1.up"))
        h = h + linear(hidden, mlp.down, "layers.1.down")
        gate = torch.sigmoid(linear(branches.norm(h), branches.right, "layers.2.right"))
        h = h + linear(h, branches.left, "layers.2.left") * gate
        expected = model.head(h)
    torch.testing.assert_close(
        outputs(after, model, x, parts, made), expected, rtol=1e-4, atol=1e-4
    )


def test_a_product_that_reads_another_reads_it_with_its_experts():
    model, example, _ = NETS["turned"]
    _, after = routed(model, example)
    of = {n.args[3].name: n for n in after.graph.nodes if n.target is add_lora_experts}
    first, second = of["expert_a_layers_2_first"], of["expert_a_layers_2_second"]
    product, rows, *_ = second.args
    assert rows is first and first in product.all_input_nodes


def test_sites_that_are_not_decided_on_are_left_alone():
    model, example, _ = NETS["plain"]
    wanted = frozenset({"layers.1.down"})
    _, after = routed(model, example, replace(EACH, sites=wanted))
    assert {s.name for s in after.sites} == wanted
    assert after.names("expert") == {"layers.1.down:a", "layers.1.down:b"}


def test_a_site_that_this_graph_cannot_route_is_refused():
    model, example, _ = NETS["plain"]
    program = found(model, example, EACH)
    lost = replace(program.found, rejected=(Rejection("layers.1.up", "it has other rows"),))
    decided = replace(EACH, sites=frozenset({"layers.1.up"}))
    with pytest.raises(CaptureError, match=r"arguments \['x'\].*layers.1.up: it has other rows"):
        run((InsertLoRA(EXPERTS),), replace(program, found=lost), decided)
