"""A classification head that experts widen: which heads are found, and what is appended."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from pipelines import Routed
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.sites import HeadSite
from moe_rewrite.kernels.head.reference import append_columns
from moe_rewrite.kernels.lora.reference import add_lora_experts
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.find_lora_sites import FindLoRASites
from moe_rewrite.passes.insert_lora import InsertLoRA
from moe_rewrite.passes.insert_router import InsertRouter
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.widen_head import WidenHead
from moe_rewrite.routing.plan import RoutingPlan
from moe_rewrite.routing.plan_views import ClassGates

DECISIONS = Decisions(1, TokenRouter(granularity="sequence"))
W = 4
EXAMPLE = torch.zeros(2, W)


class Net(nn.Module):
    """Linear layers over (batch, features), and an end of some kind."""

    def __init__(self, end, sizes=(3,)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.heads, self.end = nn.ModuleList(nn.Linear(W, n) for n in sizes), end
        self.bare = nn.Parameter(torch.randn(W, 3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.end(self, x)


ENDS = {
    "plain": lambda m, x: m.heads[0](x),
    "softmax": lambda m, x: m.heads[0](x).log_softmax(-1),
    "scaled": lambda m, x: m.heads[0](x) * 2.0 + 1.0,
    "with features": lambda m, x: {"features": x, "logits": m.heads[0](x)},
}
NO_HEADS = {
    "a matmul": lambda m, x: x @ m.bare,
    "a computed weight": lambda m, x: nn.functional.linear(x, m.heads[0].weight * 2.0),
    "of another width": lambda m, x: m.heads[0](x)[:, :2],
    "with positions": lambda m, x: m.heads[0](x)[:, None].expand(-1, 2, -1) * 2.0,
}


@cache
def cut(model, example):
    return run(TO_CUT, program_of(model, example), DECISIONS)


def fresh(model, example):
    return replace(cut(model, example), graph=copy.deepcopy(cut(model, example).graph))


def widened(model, example=EXAMPLE):
    return run((InsertRouter(), WidenHead()), fresh(model, example), DECISIONS)


NETS = {name: Net(end).eval() for name, end in (ENDS | NO_HEADS).items()}


def outputs(program, model, x, columns, plan):
    state = model.state_dict() | program.constants
    kinds = {"user": x, "expert": columns}
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    return Routed(program, plan).run(*(kinds.get(i.kind, state.get(i.name)) for i in inputs))


def plan(batch, base=True):
    gates = torch.rand(batch, 3).softmax(-1)
    return RoutingPlan((0, 1), gates[:, 1:], gates[:, :1] if base else None, 2, (batch,))


@pytest.mark.parametrize("name", ENDS)
def test_the_columns_come_after_the_heads_product(name):
    program = widened(NETS[name])
    assert program.head == HeadSite("heads.0.columns", "heads.0.weight", W)
    assert program.names("expert") == {"heads.0.columns:columns"}
    (wide,) = program.graph.find_nodes(op="call_function", target=append_columns)
    logits, rows, columns, gates = wide.args
    assert set(logits.users) == {wide} and rows in logits.args
    assert program.inputs[columns.name].kind == "expert" and gates.args[1:] == (ClassGates(),)
    assert program.numerics[-1] == ("widen head", "exact")


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_without_columns_it_computes_the_same_bit_for_bit(name, batch):
    model, x = NETS[name], torch.randn(batch, W)
    given = [outputs(p, model, x, [], plan(batch)) for p in (widened(model), cut(model, EXAMPLE))]
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))


@pytest.mark.parametrize("base", [True, False])
def test_columns_of_experts_follow_the_classes_of_the_head(base):
    """Weighed by the gates where the frozen model has one, else as they are."""
    model, x, made = NETS["plain"], torch.randn(5, W), plan(5, base)
    columns = [(torch.randn(2, W), torch.randn(2), 0), 1, (torch.randn(4, W), torch.randn(4), 1)]
    with torch.no_grad():
        (y,) = outputs(widened(model), model, x, columns, made)
        h = x
        for layer in model.layers:
            h = torch.relu(layer(h))
        parts = [model.heads[0](h), h @ columns[0][0].T + columns[0][1]]
        parts += [h @ columns[2][0].T + columns[2][1]]
        if base:
            parts = [p.softmax(-1) * made.gates[:, i : i + 1] for i, p in enumerate(parts)]
            parts = [p.log() for p in parts]
    parts.insert(2, torch.full((5, 1), -torch.inf))
    torch.testing.assert_close(y, torch.cat(parts, 1))


@pytest.mark.parametrize("positions", [1, 4, 6])
def test_every_position_of_a_sample_has_its_gates(positions):
    """Of a head that runs on all positions, one of which is taken after it; 4 samples."""
    logits, x = torch.randn(4, positions, 3), torch.randn(4, positions, W)
    columns, gates = [(torch.randn(2, W), torch.randn(2), 0), 1], torch.rand(4, 2).log()
    got = append_columns(logits, x, columns, gates)
    assert got.shape == (4, positions, 6)
    for at in range(positions):
        alone = append_columns(logits[:, at], x[:, at], columns, gates)
        torch.testing.assert_close(got[:, at], alone)


@pytest.mark.parametrize("name", NO_HEADS)
def test_what_is_no_head_is_left_alone(name):
    model = NETS[name]
    program = widened(model)
    assert program.head is None and not program.names("expert")
    assert program.numerics[-1] == ("route", "exact"), "the pass has done nothing"


@pytest.mark.parametrize("head", ["each", "pooled"])
def test_a_head_of_each_position_is_left_alone_and_one_of_pooled_features_is_not(head):
    model = networks.Network(["Mlp", "Mlp"], tokens=False, head=head).eval()
    program = widened(model, model.input(2, 6))
    assert (program.head is not None) == (head == "pooled")


def test_experts_of_the_head_itself_come_first():
    """The columns are appended to the sum of the head's product and its experts'."""
    experts = LoRAExperts(sites="all+head")
    before = (FindLoRASites(experts), InsertRouter(), InsertLoRA(experts))
    program = run((*before, WidenHead()), fresh(NETS["plain"], EXAMPLE), DECISIONS)
    (wide,) = program.graph.find_nodes(op="call_function", target=append_columns)
    logits, rows, *_ = wide.args
    assert logits.target is add_lora_experts and rows in logits.args
    assert program.head.name == "heads.0.columns" and len(program.sites) == 3


def test_of_two_heads_the_one_of_the_main_output_is_widened():
    """The main output is the first of those that the longest computations lead to."""
    model = Net(lambda m, x: (m.heads[0](x), m.heads[1](x)), (3, 3)).eval()
    assert widened(model).head.weight == "heads.0.weight"


@pytest.mark.parametrize("shapes", [((2, 5, W), (3, W)), ((3, W), (2, 5, W))])
def test_only_the_head_of_the_first_graph_is_widened(shapes):
    """A model converted on sequences has none, and may be called with rows; and the reverse."""
    first, other = (torch.randn(shape) for shape in shapes)
    model = Net(ENDS["plain"]).eval()
    moe = moe_rewrite.convert(
        model, split="layers.1", router=TokenRouter(), num_experts=2,
        example_inputs=first,
    )  # fmt: skip
    with torch.no_grad():
        for x in (first, other):
            assert torch.equal(moe(x), model(x))
    randomize(moe)
    for x in (first, other):
        assert moe(x).shape == model(x).shape and not torch.allclose(moe(x), model(x))
