"""Feed-forward regions replaced by experts: which are found, and what runs instead of them."""

import copy
from dataclasses import replace
from functools import cache

import feedforwards
import pytest
import torch
from feedforwards import D, Fused, Gated, H, Mixed, Plain
from pipelines import Routed
from torch import nn

from moe_rewrite import FFNExperts, TokenRouter
from moe_rewrite.errors import CaptureError
from moe_rewrite.experts.ffn.call import FeedForwardCall
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.gate_layout import Rows, Swapped
from moe_rewrite.ir.ops import op_name
from moe_rewrite.ir.sites import FeedForwardSite, Part, Rejection
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.insert_feedforward import FindFeedForwards, InsertFeedForward
from moe_rewrite.passes.insert_router import InsertRouter
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.routing.plan import RoutingPlan

DECISIONS = Decisions("layers.1", TokenRouter())


@cache
def net(*bodies):
    return feedforwards.Net(*bodies).eval()


@cache
def cut(*bodies, mode="eval"):
    program = program_of(net(*bodies), feedforwards.inputs(2, 6), mode)
    return run(TO_CUT, program, DECISIONS)


def find(*bodies, experts=None, mode="eval"):
    program = cut(*bodies, mode=mode)
    program = replace(program, graph=copy.deepcopy(program.graph))
    return run((FindFeedForwards(experts or FFNExperts()),), program, DECISIONS)


def insert(program, decisions=DECISIONS, sums_to_one=True):
    return run((InsertRouter(), InsertFeedForward(sums_to_one)), program, decisions)


def outputs(program, model, x, plan=None, copies=2, change=0.0):
    """With experts that are copies of the dense region, each changed in proportion to its index."""
    state = model.state_dict() | program.constants

    def given(of):
        if of.kind != "expert":
            return x if of.kind == "user" else state[of.name]
        dense = state[of.name.partition(":")[2]]
        return [dense + change * (e + 1) for e in range(copies)]

    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        (y,) = Routed(program, plan).run(*map(given, inputs))
    return y


def plan(batch, length, experts=2, top_k=None):
    share = torch.rand(batch, length, experts).softmax(-1)
    active = tuple(range(experts))
    return RoutingPlan(active, share, None, experts, (batch, length), top_k=top_k)


def no_experts(batch, length):
    return RoutingPlan((), torch.zeros(batch, length, 0), None, 2, (batch, length))


def test_sites_hold_the_weights_of_all_products():
    found = find(Plain, Gated).found
    plain, gated = found.sites
    names = [f"layers.2.{n}" for n in ("up.weight", "up.bias", "down.weight", "down.bias")]
    kept = dict(zip(names, (((0, H),), ((0, H),), ((1, H),), ()), strict=True))
    parts = tuple(Part(n, "weight", kept[n]) for n in plain.weights)
    assert plain == FeedForwardSite(
        "layers.2", parts, D, H, 2 * D * H, False, tuple(names[2:]),
        (("layers.2.up.weight", False), ("layers.2.down.weight", False)),
    )  # fmt: skip
    assert set(plain.weights) == set(names) and gated.gated and gated.name == "layers.4"
    assert plain.in_features == plain.out_features == D and gated.hidden == H
    assert not found.rejected


def test_the_graph_is_only_read():
    found = find(Plain, Gated)
    assert str(found) == str(cut(Plain, Gated)) and found.numerics[-1] == ("sites", "exact")


def test_gates_lie_as_the_regions_rows():
    found = find(Plain, feedforwards.Swapped).found
    assert [layout for uses in found.sites.values() for _, layout in uses] == [Rows(3), Swapped(3)]


@pytest.mark.parametrize(
    ("experts", "taken", "reason"),
    [
        (FFNExperts(every=2), {"layers.2", "layers.6"}, "left out by every=2"),
        (FFNExperts(every=3), {"layers.6"}, "left out by every=3"),
        (FFNExperts(sites=("layers.4",)), {"layers.4"}, "not named in sites=('layers.4',)"),
        (FFNExperts(sites=("2", "6")), {"layers.2", "layers.6"}, "not named in sites=('2', '6')"),
    ],
)
def test_regions_that_are_not_wanted_say_why(experts, taken, reason):
    found = find(Plain, Gated, Plain, experts=experts).found
    assert {site.name for site in found.sites} == taken
    others = {"layers.2", "layers.4", "layers.6"} - taken
    assert {r.name: r.reason for r in found.rejected} == dict.fromkeys(others, reason)


BODIES = {
    "plain": (Plain,), "gated": (Gated,), "fused": (Fused,), "bare": (feedforwards.Functional,),
    "length first": (feedforwards.Swapped,), "several": (Plain, Gated, Fused),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_region_is_one_node_with_its_weights_and_those_of_experts(name):
    bodies = BODIES[name]
    before, after = find(*bodies), insert(find(*bodies))
    calls = [n for n in after.graph.nodes if isinstance(n.target, FeedForwardCall)]
    assert len(calls) == len(bodies) == len(after.sites) and after.found is None
    inside = {n.name for uses in before.found.sites.values() for r, _ in uses for n in r.nodes}
    kept = {n.name for n in after.graph.nodes}
    assert inside and not inside & kept
    assert {n.name for n in before.graph.nodes} - inside <= kept
    wanted = {f"{s.name}:{w}" for s in after.sites for w in s.weights}
    assert after.names("expert") == wanted
    assert after.names("weight") == before.names("weight")


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("size", [(1, 4), (3, 2)])
def test_without_experts_it_computes_the_same(name, size):
    model, x = net(*BODIES[name]), feedforwards.inputs(*size)
    before, after = find(*BODIES[name]), insert(find(*BODIES[name]))
    y = outputs(after, model, x, no_experts(*size))
    torch.testing.assert_close(y, outputs(before, model, x))


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_copies_whose_gates_sum_to_one_give_the_same(name, top_k):
    model, x = net(*BODIES[name]), feedforwards.inputs(3, 4)
    after = insert(find(*BODIES[name]))
    made = plan(3, 4, top_k=top_k)
    dense = outputs(find(*BODIES[name]), model, x)
    torch.testing.assert_close(outputs(after, model, x, made), dense, rtol=1e-4, atol=1e-5)
    changed = outputs(after, model, x, made, change=0.1)
    assert (changed - dense).abs().max() > 0.01


def test_experts_are_summed_by_their_gates():
    """By the definition, for experts unlike the dense region."""
    model, x, made = net(Plain), feedforwards.inputs(3, 4), plan(3, 4)
    after = insert(find(Plain))
    y = outputs(after, model, x, made, change=0.1)
    with torch.no_grad():
        h = model.embed(x)
        for layer in model.layers[:2]:
            h = h + layer(h)
        total = 0
        for e in range(2):
            expert = copy.deepcopy(model.layers[2])
            for p in expert.parameters():
                p += 0.1 * (e + 1)
            total = total + made.weights[..., e : e + 1] * expert(h)
        torch.testing.assert_close(y, model.head(h + total), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("one", "declared"), [(True, "reordered"), (False, "approximate")])
def test_gates_that_sum_to_one_make_it_equal_in_another_order(one, declared):
    assert insert(find(Plain), sums_to_one=one).numerics[-1] == ("insert experts", declared)


class Chain(nn.Module):
    """Regions one after the other, with nothing between; one of them runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Mixed(), Mixed()])
        self.a, self.b = Plain(), Gated()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.b(self.a(self.b(x)))


def test_a_region_that_runs_twice_is_one_site_and_each_call_reads_the_one_before():
    model = Chain().eval()
    program = run(TO_CUT, program_of(model, torch.zeros(2, 6, D)), DECISIONS)
    x = torch.randn(3, 4, D)
    dense = outputs(program, model, x)
    after = insert(run((FindFeedForwards(FFNExperts()),), program, DECISIONS))
    assert [s.name for s in after.sites] == ["b", "a"]
    calls = [n for n in after.graph.nodes if isinstance(n.target, FeedForwardCall)]
    assert len(calls) == 3 and calls[0] in calls[1].args and calls[1] in calls[2].args
    torch.testing.assert_close(outputs(after, model, x, plan(3, 4)), dense, rtol=1e-4, atol=1e-5)


class Within(nn.Module):
    """A feed-forward after rows that are merged and taken apart, which runs once more as `last` has
    it."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.ffn, self.last = feedforwards.Plain(), last

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        x = torch.tanh(self.layers[1](x.reshape(-1, D)).view(x.shape))
        y = self.layers[1](x.reshape(-1, D)).view(x.shape)
        return self.last(self.ffn, self.ffn(y))


def test_rows_taken_apart_before_a_feed_forward_are_no_part_of_it():
    model = Within(lambda ffn, y: ffn(y)).eval()
    program = run(TO_CUT, program_of(model, torch.zeros(2, 6, D)), DECISIONS)
    after = run((FindFeedForwards(FFNExperts()),), program, DECISIONS)
    (uses,) = [u for site, u in after.found.sites.items() if site.name == "ffn"]
    assert [layout for _, layout in uses] == [Rows(3), Rows(3)]
    x = torch.randn(3, 4, D)
    dense = outputs(program, model, x)
    torch.testing.assert_close(
        outputs(insert(after), model, x, plan(3, 4)), dense, rtol=1e-4, atol=1e-5
    )


def test_a_weight_that_also_runs_outside_of_its_feed_forward_leaves_it_as_it_is():
    """Experts would replace it at one place and not at the other."""
    model = Within(lambda ffn, y: ffn.down(ffn.up(y))).eval()
    program = run(TO_CUT, program_of(model, torch.zeros(2, 6, D)), DECISIONS)
    found = run((FindFeedForwards(FFNExperts()),), program, DECISIONS).found
    assert "ffn" not in {site.name for site in found.sites}
    (reason,) = [r.reason for r in found.rejected if r.name == "ffn"]
    assert reason == "one of its weights is also used outside of it, at ffn.up"


def test_in_training_a_dropout_between_the_products_stays_with_them():
    after = insert(find(Plain, mode="train"))
    (call,) = [n.target for n in after.graph.nodes if isinstance(n.target, FeedForwardCall)]
    assert "dropout" not in {op_name(n) for n in after.graph.nodes if n.op == "call_function"}
    inside = {op_name(n) for n in call.body.middle.module.graph.nodes if n.op == "call_function"}
    assert inside == {"gelu", "dropout"}


def test_a_site_that_this_graph_cannot_route_is_refused():
    program = find(Plain)
    lost = replace(program.found, rejected=(Rejection("layers.2", "no rows"),))
    decided = replace(DECISIONS, sites=frozenset({"layers.2"}))
    with pytest.raises(CaptureError, match="cannot be routed: layers.2: no rows"):
        insert(replace(program, found=lost), decided)


def test_sites_that_are_not_decided_on_stay_as_they_are():
    decided = replace(DECISIONS, sites=frozenset({"layers.4"}))
    after = insert(find(Plain, Gated), decided)
    assert [s.name for s in after.sites] == ["layers.4"]
    assert "gelu" in {op_name(n) for n in after.graph.nodes if n.op == "call_function"}
