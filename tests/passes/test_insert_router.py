"""Inserting the router: one node that reads the cut, and nothing else."""

import networks
import pytest
import torch
from torch import fx, nn

from moe_rewrite.errors import InvariantError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.gate_layout import Rows, Samples
from moe_rewrite.ir.program import Input, routing_plan
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.insert_router import InsertRouter, router_node
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.wiring import expert_input, plan_view
from moe_rewrite.routing.plan_views import SortedGates, WholePlan, view_plan

MODELS = {
    "sequence": (networks.Network(["Mlp", "Mlp"], tokens=False), torch.zeros(2, 6, 5)),
    "samples": (nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.zeros(2, 4)),
    "map": (nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3))), torch.zeros(2, 3, 9, 9)),
}


def cut(name, split=1):
    model, given = MODELS[name]
    return run(TO_CUT, program_of(model, given), Decisions(split))


@pytest.mark.parametrize(("name", "split"), [(n, s) for n in MODELS for s in (0, 1, -1)])
def test_one_node_right_after_the_cut_reads_it(name, split):
    program = cut(name, split)
    before = [n.name for n in program.graph.nodes]
    routed = run((InsertRouter(),), program, Decisions(split))
    router = router_node(routed)
    assert router.target is routing_plan and router.args == (routed.node(routed.cut.node),)
    assert router.prev.name == routed.cut.node and not router.users
    assert [n.name for n in routed.graph.nodes if n is not router] == before
    assert routed.numerics[-1] == ("route", "exact")


@pytest.mark.parametrize("name", MODELS)
def test_what_the_graph_gives_does_not_read_the_plan(name):
    model, _ = MODELS[name]
    program = run((InsertRouter(),), cut(name), Decisions(1))
    x = torch.randn(5, *MODELS[name][1].shape[1:])
    state = model.state_dict()
    inputs = [program.inputs[n.name].name for n in program.graph.find_nodes(op="placeholder")]

    class Unrouted(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            return None if target is routing_plan else super().call_function(target, args, kwargs)

    given = [state.get(name, x) for name in inputs]
    (y,) = Unrouted(program.root, graph=program.graph).run(*given)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


def test_a_second_router_is_refused():
    program = run((InsertRouter(),), cut("samples"), Decisions(1))
    with pytest.raises(InvariantError, match="2 routers"):
        run((InsertRouter(),), program, Decisions(1))


def test_equal_views_of_the_plan_are_one_node():
    program = run((InsertRouter(),), cut("sequence"), Decisions(1))
    views = [SortedGates(Rows(3), True), SortedGates(Rows(3), False), WholePlan(), WholePlan()]
    views += [SortedGates(Rows(3), True), SortedGates(Samples(3), True)]
    nodes = [plan_view(program, view) for view in views]
    assert nodes[0] is nodes[4] and nodes[2] is nodes[3] and len(set(nodes)) == 4
    for node, view in zip(nodes, views, strict=True):
        assert node.target is view_plan and node.args == (router_node(program), view)
    assert program.after("views", "exact")


def test_experts_come_in_as_placeholders_of_their_own():
    program = run((InsertRouter(),), cut("sequence"), Decisions(1))
    inputs = dict(program.inputs)
    parts = [expert_input(program, inputs, "layers.1.up", part) for part in ("a", "b")]
    after = program.after("experts", "exact", inputs=inputs)
    assert [after.inputs[p.name] for p in parts] == [
        Input("expert", "layers.1.up:a"), Input("expert", "layers.1.up:b"),
    ]  # fmt: skip
    assert all(p.op == "placeholder" and p.name.isidentifier() for p in parts)
    assert after.names("expert").isdisjoint(program.names("expert"))
