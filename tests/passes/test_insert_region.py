"""Convolutional regions replaced by experts on patches: what is found, refused and put in."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import stages
import torch
from pipelines import Routed
from torch import nn

from moe_rewrite import PatchRouter, RegionExperts
from moe_rewrite.errors import ConversionError
from moe_rewrite.experts.region.call import RegionCall
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import mutated, op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.insert_region import FindRegion, InsertRegion
from moe_rewrite.passes.insert_router import InsertRouter
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.routing.plan import RoutingPlan

DECISIONS = Decisions("stage", PatchRouter(grid=4, per_expert=4))


@cache
def net(name="norm"):
    torch.manual_seed(0)
    if name == "norm":
        stage = [nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        return stages.Stage(*stage, nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()).eval()
    return stages.STAGES[name]().eval()


@cache
def cut(name="norm", mode="eval"):
    return run(TO_CUT, program_of(net(name), stages.image(2, 16), mode), DECISIONS)


def find(name="norm", experts=None, count=2, decisions=DECISIONS, mode="eval"):
    program = replace(cut(name, mode), graph=copy.deepcopy(cut(name, mode).graph))
    return run((FindRegion(experts or RegionExperts(), count),), program, decisions)


def insert(program, decisions=DECISIONS):
    return run((InsertRouter(), InsertRegion()), program, decisions)


def outputs(program, model, x, plan=None):
    """With as many copies of the dense region as the plan has experts."""
    state = model.state_dict() | program.constants

    def given(of):
        if of.kind != "expert":
            return x if of.kind == "user" else state[of.name].clone()
        return [state[of.name.partition(":")[2]].clone() for _ in plan.active]

    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        (y,) = Routed(program, plan).run(*map(given, inputs))
    return y


def whole(batch):
    """A plan without patches: the dense region runs."""
    return RoutingPlan((), torch.zeros(batch, 0), None, 2, (batch,))


def all_patches(batch, grid=4):
    """A plan in which one expert takes every patch."""
    ids = torch.arange(grid * grid).expand(batch, 1, -1).contiguous()
    weights = torch.ones(batch, grid * grid, 1)
    taken = torch.ones(batch, 1, grid * grid)
    return RoutingPlan((0,), weights, None, 1, (batch,), ids, taken, grid)


def test_the_site_says_what_each_expert_has():
    (site,) = find().found.sites
    names = dict(net().stage.named_parameters()) | dict(net().stage.named_buffers())
    owned = {f"stage.{n}" for n in names if "num_batches" not in n}
    assert site.name == "stage" and {p.name for p in site.parts} == owned
    assert {p.kind for p in site.parts if "running" in p.name} == {"buffer"}
    assert site.in_features == "6x16x16" and site.out_features == "6x8x8"
    assert site.dense_macs == 64 * (9 * 6 * 8 + 9 * 8 * 6)
    assert site.score_macs == 6 * 16 * 16 and 0 < site.expert_macs < site.dense_macs
    assert "mean" in site.ends and not any(p.kept for p in site.parts)


def test_a_share_of_the_hidden_channels_is_kept_in_both_convolutions():
    (site,) = find(experts=RegionExperts(width=0.5)).found.sites
    kept = {p.name: p.kept for p in site.parts}
    assert kept["stage.0.weight"] == kept["stage.1.bias"] == kept["stage.1.running_var"]
    assert kept["stage.0.weight"] == ((0, 4),) and kept["stage.3.weight"] == ((1, 4),)
    assert kept["stage.3.bias"] == ()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_output_channels_are_shared_out(count):
    (site,) = find(experts=RegionExperts(combine="concat"), count=count).found.sites
    kept = {p.name: p.kept for p in site.parts}
    assert kept["stage.3.weight"] == kept["stage.3.bias"] == ((0, 6 // count),)
    assert kept["stage.0.weight"] == ()


REFUSED = {
    "a grid finer than the map": (
        {"decisions": replace(DECISIONS, router=PatchRouter(grid=9))},
        "grid=9: the output of region 'stage' is a map of 6x8x8: choose a grid of at most 8",
    ),
    "channels that do not divide": (
        {"experts": RegionExperts(combine="concat"), "count": 4},
        "6 output channels do not divide among 4 experts",
    ),
    "no hidden channels": (
        {"experts": RegionExperts(region="stage.3", width=0.5)},
        "width=0.5: region 'stage.3' has no hidden channels",
    ),
    "output channels that are the entry's": (
        {"experts": RegionExperts(region="stage.1", combine="concat")},
        "the output channels of region 'stage.1' are not its own",
    ),
    "no weights": (
        {"experts": RegionExperts(region="stage.2")},
        "region 'stage.2' holds no weights, so that experts of it would learn nothing",
    ),
    "an unknown module": ({"experts": RegionExperts(region="stage.9")}, "region='stage.9': no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_expert_can_run_is_refused(case):
    given, match = REFUSED[case]
    with pytest.raises(ConversionError, match=match):
        find(**given)


def test_a_cut_without_a_map_is_refused():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    program = run(TO_CUT, program_of(model, torch.zeros(2, 4)), Decisions(1))
    with pytest.raises(ConversionError, match="the cut carries .*not a feature map"):
        run((FindRegion(RegionExperts(), 2),), program, replace(DECISIONS, split=1))


def test_writes_in_place_become_plain_and_the_values_stay():
    before, after = cut(), find()
    names = [[str(n.target) for n in p.graph.nodes] for p in (before, after)]
    assert "aten.relu_.default" in names[0] and "aten.relu_.default" not in names[1]
    assert [n.replace("_.", ".") for n in names[0]] == [n.replace("_.", ".") for n in names[1]]
    x = stages.image(5, 16, seed=3)
    assert torch.equal(outputs(before, net(), x), outputs(after, net(), x))
    assert after.numerics[-1] == ("sites", "exact")


NAMES = ["norm", "stride", "groups", "pooling", "zero pad", "max after negative", "in place"]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_plan_of_patches_it_computes_the_same(name):
    after = insert(find(name))
    x = stages.image(3, 16, seed=4)
    y = outputs(after, net(name), x, whole(3))
    torch.testing.assert_close(y, outputs(cut(name), net(name), x), rtol=1e-5, atol=1e-6)
    assert after.numerics[-1] == ("insert experts", "reordered")


@pytest.mark.parametrize("name", NAMES)
def test_with_halos_every_patch_gives_what_the_dense_region_gives_there(name):
    after = insert(find(name))
    x = stages.image(3, 16, seed=4)
    y = outputs(after, net(name), x, all_patches(3))
    torch.testing.assert_close(y, outputs(cut(name), net(name), x), rtol=1e-4, atol=1e-5)


def test_patches_without_halo_see_zeros_around_them():
    after = insert(find(experts=RegionExperts(halo=False)))
    x = stages.image(3, 16, seed=4)
    y = outputs(after, net(), x, all_patches(3))
    assert (y - outputs(cut(), net(), x)).abs().max() > 1e-3


def test_the_region_is_one_node_that_reads_the_whole_plan():
    before, after = find(), insert(find())
    (call,) = [n for n in after.graph.nodes if isinstance(n.target, RegionCall)]
    (replacement,) = before.found.sites.values()
    inside = {n.name for n in replacement.region.nodes}
    assert not inside & {n.name for n in after.graph.nodes}
    entry, plan, *_ = call.args
    assert entry.name == after.cut.node and plan in after.graph.nodes
    assert call.meta["val"].shape[1:] == (6, 8, 8) and "mean" in map(op_name, call.users)
    (site,) = after.sites
    assert after.names("expert") == {f"stage:{p.name}" for p in site.parts}
    assert after.found is None and after.lowered == (
        ("stage", "equal groups, the patches of an expert in one batch"),
    )


def test_in_training_batch_statistics_are_written_of_the_experts_too():
    after = insert(find(mode="train"))
    (call,) = [n for n in after.graph.nodes if isinstance(n.target, RegionCall)]
    written = {after.inputs[n.name].name for n in mutated(call)}
    statistics = {"stage.1.running_mean", "stage.1.running_var"}
    assert written == statistics | {f"stage:{n}" for n in statistics}
