"""A program: how it prints, and its invariants."""

import copy
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from torch import nn

from moe_rewrite import TokenRouter
from moe_rewrite.errors import InvariantError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.program import Cut, Input, check, lead_of, routing_plan
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.insert_router import InsertRouter
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.wiring import expert_input

DECISIONS = Decisions(1, TokenRouter())


@cache
def captured():
    model = networks.Network(["Mlp", "Mlp"], tokens=False)
    return run(TO_CUT, program_of(model, model.input(2, 6)), DECISIONS)


@pytest.fixture
def program():
    return replace(captured(), graph=copy.deepcopy(captured().graph))


@pytest.fixture
def routed(program):
    return run((InsertRouter(),), program, DECISIONS)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x, shift):
        y = self.mix(self.norm(x)).float()
        return {"y": y.mul_(2.0), "parts": [y.chunk(3, dim=1)[0], shift + torch.ones(3), None, 7]}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_program_prints_a_line_for_each_node(mode):
    given = {"x": torch.zeros(2, 4), "shift": torch.zeros(3, dtype=torch.float64)}
    program = program_of(Norm(), given, mode)
    lines = [line.strip() for line in str(program).splitlines()]
    assert lines[0] == f"Norm ({mode}):" and len(lines) == 1 + len(program.graph.nodes)
    assert "p_mix_weight: weight mix.weight  # float32[3, 4]" in lines
    assert "b_norm_running_mean: buffer norm.running_mean  # float32[4]" in lines
    assert any(line.startswith("shift: user shift  # float64[") for line in lines)
    (norm,) = (line for line in lines if "= batch_norm(" in line)
    assert f"b_norm_running_var, {mode == 'train'}, 0.1, 1e-05" in norm and ", 4]" in norm
    (scaled,) = (line for line in lines if line.startswith("mul_ = mul("))
    assert ", 2.0)  # float32[" in scaled and scaled.endswith(", 3]"), "a name without underscore"
    assert "chunk = chunk(mul_, 3, 1)" in lines, "what is no tensor has no sizes"
    assert any(line.startswith("getitem = getitem(chunk, 0)  # float32[") for line in lines)
    assert any(line.startswith("ones = ones([3], device=") for line in lines)
    assert lines[-1] == "return (mul_, getitem, add, None, 7)"


def test_the_cut_and_the_router_are_printed(program):
    lines = [line.strip() for line in str(program).splitlines()]
    at = lines.index("-- deep from layers.1 --")
    assert lines[at - 1].startswith(f"{program.cut.node} = add(")
    lines = [line.strip() for line in str(run((InsertRouter(),), program, DECISIONS)).splitlines()]
    assert lines[at + 1] == f"routing_plan = routing_plan({program.cut.node})"


def test_open_sizes_are_printed_as_they_are_called(program):
    (leaf,) = program.leaves()
    batch, length, width = leaf.meta["val"].shape
    assert f"x: user x  # float32[{batch}, {length}, {width}]" in str(program)
    assert not isinstance(batch, int) and width == 5


def test_nodes_leaves_and_names_are_found_by_what_they_stand_for(program):
    assert program.node(program.cut.node).name == program.cut.node
    assert [n.name for n in program.leaves()] == ["x"]
    assert program.names("user") == {"x"} and not program.names("buffer", "expert")
    model = networks.Network(["Mlp", "Mlp"], tokens=False)
    assert program.names("weight", "user") == {"x", *dict(model.named_parameters())}


def test_leaves_come_in_the_order_of_the_call():
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, later, first):
            return self.a(first["x"]) + later[1] * later[0]

    given = {"later": (torch.zeros(2, 3), torch.zeros(2, 3)), "first": {"x": torch.zeros(2, 3)}}
    program = program_of(Call(), given)
    assert [n.name for n in program.leaves()] == ["later_0", "later_1", "first_x"]


def test_after_records_the_pass_and_leaves_the_old_program_as_it_was(program):
    before = program.numerics
    after = program.after("trim", "approximate", mode="train")
    assert after.numerics == (*before, ("trim", "approximate")) and after.mode == "train"
    assert program.numerics == before and program.mode == "eval" and after.graph is program.graph


# -- invariants ------------------------------------------------------------------------------------


def refused(program, match, **changes):
    """Both by `check` and by `after`."""
    with pytest.raises(InvariantError, match=match):
        program.after("broken", "exact", **changes)
    with pytest.raises(InvariantError, match=match):
        check(replace(program, **changes))


def test_a_placeholder_without_a_meaning_is_refused(program):
    rest = {k: v for k, v in program.inputs.items() if k != "x"}
    refused(program, r"without a meaning, or the reverse: \['x'\]", inputs=rest)
    more = program.inputs | {"gone": Input("weight", "gone.weight")}
    refused(program, r"or the reverse: \['gone'\]", inputs=more)


@pytest.mark.parametrize("kind", ["weight", "buffer", "expert"])
def test_what_is_owned_twice_is_refused(program, kind):
    twice = program.inputs | {"p_head_bias": Input(kind, "embed.weight")}
    refused(program, r"owned twice: \['embed.weight'\]", inputs=twice)


def test_two_inputs_of_a_call_may_go_by_one_name(program):
    """Only what is owned is counted."""
    renamed = program.inputs | {"p_head_bias": Input("user", "x")}
    assert program.after("rename", "exact", inputs=renamed).names("user") == {"x"}


def test_a_graph_that_reads_what_is_not_there_is_refused(program):
    cut = program.node(program.cut.node)
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        program.graph.call_function(torch.relu, (cut,))
    refused(program, "the graph is not well formed")


def test_a_second_router_is_refused(routed):
    cut = routed.node(routed.cut.node)
    with routed.graph.inserting_after(cut):
        routed.graph.call_function(routing_plan, (cut,))
    refused(routed, "2 routers: expected one")


@pytest.mark.parametrize("read", ["x", "linear", "add_1"])
def test_a_router_that_does_not_read_the_cut_is_refused(routed, read):
    assert read != routed.cut.node
    cut = Cut(read, "elsewhere", 0, None, None)
    refused(routed, f"the router reads {routed.cut.node}, not the cut", cut=cut)


def test_an_expert_that_meets_what_the_router_does_not_feed_is_refused(routed):
    inputs = dict(routed.inputs)
    expert = expert_input(routed, inputs, "layers.0.up", "a")
    good = routed.after("unused", "exact", inputs=inputs)
    (plan,) = good.graph.find_nodes(op="call_function", target=routing_plan)
    with good.graph.inserting_after(plan):
        fed = good.graph.call_function(torch.add, (plan, expert))
    assert good.after("fed", "exact").names("expert") == {"layers.0.up:a"}
    with good.graph.inserting_after(fed):
        good.graph.call_function(torch.relu, (expert,))
    refused(good, "expert layers.0.up:a is not fed by the router")


def test_before_there_is_a_cut_routers_are_not_looked_at(routed):
    cut = routed.node(routed.cut.node)
    with routed.graph.inserting_after(cut):
        routed.graph.call_function(routing_plan, (cut,))
    assert routed.after("uncut", "exact", cut=None).cut is None


def test_a_router_that_runs_outside_of_a_converted_model_says_so():
    with pytest.raises(InvariantError, match="outside a converted model"):
        routing_plan(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("shape", "lead"), [((2, 3), (2,)), ((2, 5, 3), (2, 5)), ((2, 3, 8, 8), (2,))]
)
def test_the_rows_of_a_cut_are_all_but_features_and_of_a_map_its_samples(shape, lead):
    assert lead_of(torch.zeros(shape).shape) == lead
