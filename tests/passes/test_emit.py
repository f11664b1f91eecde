"""Programs as steps: one function a block, that together compute what the graph does."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from pipelines import all_passes
from torch import fx, nn

from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.program import routing_plan
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.emit import emit
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.recipe import make_recipe
from moe_rewrite.routing.plan import RoutingPlan
from moe_rewrite.routing.plan_views import ClassGates, ScaledGates, view_plan

RECIPE = make_recipe(router=TokenRouter(), experts=LoRAExperts(rank=2), backend="reference")
LAYERS = ["Mlp", "Mlp", "Attention", "Mlp"]


@cache
def network(*layers, head="each"):
    return networks.Network(layers, tokens=False, head=head)


@cache
def captured(*layers, mode="eval", head="each"):
    return program_of(network(*layers, head=head), torch.zeros(2, 6, 5), mode)


def cut(split, *layers, mode="eval", head="each"):
    program = captured(*layers, mode=mode, head=head)
    program = replace(program, graph=copy.deepcopy(program.graph))
    return run(TO_CUT, program, Decisions(split))


def routed(split, *layers, head="each"):
    decisions = Decisions(split, TokenRouter())
    program = captured(*layers, head=head)
    program = replace(program, graph=copy.deepcopy(program.graph))
    return run(all_passes(RECIPE, TokenRouter()), program, decisions)


def values(emitted, model, x, plan=None, experts=None):
    """What steps make, by name; each value is gone after the step that drops it."""
    tensors = {n: t.clone() for n, t in model.state_dict().items()} | emitted.constants
    tensors |= experts or {}
    known = {name: x for step in emitted.steps[:1] for name in step.takes}  # the input
    inputs = set(known)
    for step in emitted.steps:
        if step.deep and plan is not None:
            known |= {name: view.of(plan) for name, view in emitted.views if name not in known}
        given = [tensors[name] for _, name in step.owned] + [known[name] for name in step.takes]
        before = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
        made = step.code.call(*given)
        changed = [
            i for i, (a, b) in enumerate(zip(given, before, strict=True))
            if isinstance(a, torch.Tensor) and not torch.equal(a, b)
        ]  # fmt: skip
        assert set(changed) <= set(step.writes), "written, and not said"
        known |= dict(zip(step.gives, made, strict=True))
        for name in step.drops:
            if name not in inputs and name not in dict(emitted.views):
                del known[name]
    return known, tensors


def outputs(emitted, *args, **kwargs):
    known, _ = values(emitted, *args, **kwargs)
    return [known[o] if isinstance(o, str) else o.value for o in emitted.outputs]


@pytest.mark.parametrize("split", [1, 2, -1, "layers.1.up"])
@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_steps_compute_what_the_model_does_bit_for_bit(split, size):
    model = network(*LAYERS)
    emitted = emit(cut(split, *LAYERS))
    x = torch.randn(*size, 5)
    with torch.no_grad():
        (y,) = outputs(emitted, model, x)
        assert torch.equal(y, model.eval()(x))


@pytest.mark.parametrize("split", [1, 2])
def test_a_step_is_a_block(split):
    emitted = emit(cut(split, *LAYERS))
    blocks = ["stem", *(f"layers.{i}" for i in range(4)), "head"]
    assert [s.block for s in emitted.steps] == blocks
    assert [s.deep for s in emitted.steps] == [i > split for i in range(6)]
    (owned,) = [s.owned for s in emitted.steps if s.block == "layers.1"]
    assert {name for _, name in owned} == {
        f"layers.1.{n}" for n in dict(network(*LAYERS).layers[1].named_parameters())
    }


class Deep(nn.Module):
    """Layers of two linear maps each, without a sum around them."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.b(torch.relu(self.a(x))))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_with_the_cut_inside_is_two_steps():
    """One on each side of the cut."""
    model = Deep()
    program = run(TO_CUT, program_of(model, torch.zeros(2, 3, 4)), Decisions("layers.1.b"))
    emitted = emit(program)
    of = [(s.block, s.deep) for s in emitted.steps if s.block == "layers.1"]
    assert of == [("layers.1", False), ("layers.1", True)]
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        assert torch.equal(outputs(emitted, model, x)[0], model(x))


def test_code_owns_nothing_and_is_pure_but_for_what_it_says():
    for step in emit(cut(1, *LAYERS)).steps:
        assert not list(step.code.module.state_dict())
        placeholders = step.code.module.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(step.owned) + len(step.takes)
        assert not step.writes and copy.deepcopy(step.code) is step.code


def test_each_value_is_given_before_it_is_taken_and_dropped_after_its_last_use():
    program = cut(1, "Mlp", "Branches", "Mlp", 0)
    emitted = emit(program)
    known = {"x"}
    for i, step in enumerate(emitted.steps):
        assert set(step.takes) <= known and set(step.drops) <= set(step.takes)
        known |= set(step.gives)
        later = {n for s in emitted.steps[i + 1 :] for n in s.takes} | set(emitted.outputs)
        assert not later & set(step.drops)
        kept = set(step.takes) - set(step.drops)
        assert kept <= later | {emitted.cut} | ({"x"} if not step.deep else set())
        assert set(step.gives) <= later | {emitted.cut}
    assert set(emitted.sizes) == {n for s in emitted.steps for n in (*s.takes, *s.gives)}


def test_equal_blocks_share_their_code_and_so_do_programs_that_are_given_it():
    codes = {}
    first, again = (emit(cut(1, *LAYERS), codes) for _ in range(2))
    assert [a.code is b.code for a, b in zip(first.steps, again.steps, strict=True)] == [True] * 6
    by = {s.block: s.code for s in first.steps}
    assert (
        by["layers.0"] is by["layers.1"] is by["layers.3"] and by["layers.0"] is not by["layers.2"]
    )
    other = emit(cut(1, *LAYERS))
    assert all(a.code is not b.code for a, b in zip(first.steps, other.steps, strict=True))


def test_training_steps_say_which_buffers_they_write():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(5, 4)
    for mode in ("eval", "train"):
        emitted = emit(run(TO_CUT, program_of(model, x, mode), Decisions(1)))
        written = {s.owned[i][1] for s in emitted.steps for i in s.writes}
        names = {n for n, _ in model.named_buffers()} if mode == "train" else set()
        assert written == names
        _, tensors = values(emitted, model, x)
    expected = copy.deepcopy(model).train()
    expected(x)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(tensors[name], buffer)


class Carried(Deep):
    """Each layer begins by writing to what the one before it made, through a view."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            torch.relu_(x.view(-1, 4))
            return self.a(x)

    def forward(self, x):
        return super().forward(x * 2.0), None, 3


def test_a_step_says_that_it_writes_to_a_value_that_it_takes():
    model = Carried()
    emitted = emit(run(TO_CUT, program_of(model, torch.zeros(2, 3, 4)), Decisions(1)))
    written = {s.block: [s.takes[i - len(s.owned)] for i in s.writes] for s in emitted.steps}
    assert written["layers.1"] == ["linear"] and written["layers.2"] == ["linear_1"]
    x = torch.randn(4, 2, 4)
    with torch.no_grad():
        made = outputs(emitted, model, x)
        assert torch.equal(made[0], model(x)[0]) and made[1:] == [None, 3]


@pytest.mark.parametrize("head", ["each", "pooled"])
def test_the_router_is_between_the_steps_and_its_views_go_to_the_deep_ones(head):
    program = routed(1, *LAYERS, head=head)
    emitted = emit(program)
    views = dict(emitted.views)
    kinds = {type(v) for v in views.values()}
    assert kinds == ({ScaledGates, ClassGates} if head == "pooled" else {ScaledGates})
    assert emitted.cut == program.cut.node and emitted.numerics == program.numerics
    for step in emitted.steps:
        targets = {n.target for n in step.code.module.graph.nodes}
        assert not targets & {routing_plan, view_plan}
        assert step.deep or not set(step.takes) & set(views)
        at = [name in views for name in step.takes]
        assert at == sorted(at), "views come last"


def test_steps_with_experts_compute_what_the_graph_does():
    program = routed(1, *LAYERS)
    emitted = emit(program)
    model, x = network(*LAYERS), torch.randn(3, 4, 5)
    gates = torch.rand(3, 4, 3).softmax(-1)
    plan = RoutingPlan((0, 1), gates[..., 1:], gates[..., :1], 2, (3, 4))
    experts = {}
    for site in program.sites:
        experts[f"{site.name}:a"] = torch.randn(4, site.in_features)
        experts[f"{site.name}:b"] = torch.randn(site.out_features, 4)
    (y,) = outputs(emitted, model, x, plan, experts)

    class Routed(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            return plan if target is routing_plan else super().call_function(target, args, kwargs)

    tensors = model.state_dict() | experts | {"x": x}
    given = [
        tensors[program.inputs[n.name].name] for n in program.graph.find_nodes(op="placeholder")
    ]
    (expected,) = Routed(program.root, graph=program.graph).run(*given)
    assert torch.equal(y, expected)
    with torch.no_grad():
        assert not torch.allclose(y, model.eval()(x))
