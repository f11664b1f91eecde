"""The list of passes: what each is, how they run, and that later graphs follow the decisions."""

import copy
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from functools import cache

import feedforwards
import networks
import pytest
import stages
import torch
from pipelines import all_passes
from torch import nn

from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter
from moe_rewrite.errors import CaptureError, ConversionError
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from moe_rewrite.passes.base import Decisions, Pass
from moe_rewrite.passes.decide import plan_conversion
from moe_rewrite.passes.divide_experts import DivideExperts
from moe_rewrite.passes.pipeline import Timer, run
from moe_rewrite.passes.recipe import make_recipe

RECIPES = {
    "lora": make_recipe(router=TokenRouter()),
    "reference": make_recipe(router=TokenRouter(), backend="reference"),
    "feed-forwards": make_recipe(router=TokenRouter(), experts=FFNExperts(num=2)),
    "upcycle": make_recipe("upcycle"),
    "regions": make_recipe(router=PatchRouter(grid=4), experts=RegionExperts()),
}
ORDER = {
    "lora": "inline regions clean depth split sites freeze route insert experts widen head lower",
    "reference": "inline regions clean depth split sites freeze route insert experts widen head",
    "feed-forwards": "inline regions clean depth split sites freeze route insert experts widen head lower",
    "upcycle": "inline regions clean depth split sites route insert experts widen head lower",
    "regions": "inline regions clean depth split sites freeze route insert experts widen head",
}


def passes(name):
    return all_passes(RECIPES[name], RECIPES[name].router or TokenRouter(top_k=2, base=False))


def kinds(of=Pass):
    for kind in of.__subclasses__():
        if kind.__module__.startswith("moe_rewrite."):
            yield kind
            yield from kinds(kind)


@pytest.mark.parametrize("name", RECIPES)
def test_the_order_of_passes(name):
    assert " ".join(p.name for p in passes(name)) == ORDER[name]


def test_every_pass_of_the_package_is_in_one_of_the_lists():
    """But for the one that runs where a model is divided, after the others."""
    listed = {type(p) for name in RECIPES for p in passes(name)}
    assert listed == set(kinds()) - {DivideExperts}


@pytest.mark.parametrize("name", RECIPES)
def test_passes_are_values(name):
    """Frozen, equal where their options are, with a name and one of three words."""
    for one, again in zip(passes(name), passes(name), strict=True):
        assert is_dataclass(one) and one == again and hash(one) == hash(again)
        assert one.name and one.numerics in ("exact", "reordered", "approximate")
        with pytest.raises(FrozenInstanceError):
            setattr(one, next((f.name for f in fields(one)), "name"), None)
    assert len(set(passes(name))) == len(passes(name))


def test_passes_with_other_options_are_others():
    other = all_passes(
        make_recipe(router=TokenRouter(), experts=LoRAExperts(rank=3)), TokenRouter()
    )
    different = [a.name for a, b in zip(passes("lora"), other, strict=True) if a != b]
    assert different == ["sites", "insert experts"]


def test_decisions_are_values():
    one, again = (Decisions(1, TokenRouter(), sites=frozenset("ab")) for _ in range(2))
    assert one == again and hash(one) == hash(again) and one.chosen == TokenRouter()
    assert one != replace(one, sites=frozenset("a")) != Decisions(2)
    with pytest.raises(FrozenInstanceError):
        one.split = 2


@dataclass(frozen=True)
class Noted(Pass):
    """Counts its runs in the program, which here is a list."""

    name: str
    fails: bool = False

    def apply(self, program, decisions):
        if self.fails:
            raise CaptureError("no")
        return [*program, (self.name, decisions.split)]


def test_passes_run_in_order_each_timed_by_its_name():
    timed = Timer()
    made = run((Noted("a"), Noted("b"), Noted("a")), [], Decisions(3), timed)
    assert made == [("a", 3), ("b", 3), ("a", 3)]
    assert list(timed.seconds) == ["a", "b"] and all(s >= 0 for s in timed.seconds.values())
    first = dict(timed.seconds)
    with pytest.raises(CaptureError):
        run((Noted("b"), Noted("c", fails=True), Noted("d")), [], Decisions(3), timed)
    assert list(timed.seconds) == ["a", "b", "c"] and timed.seconds["b"] > first["b"]
    assert run((), [7], Decisions(3)) == [7]


def test_a_timer_hands_on_arguments_and_result():
    assert Timer()("sum", lambda a, b=1: a + b, 2, b=5) == 7


# -- later graphs ----------------------------------------------------------------------------------


class Masked(nn.Module):
    """Layers over positions, with a mask that a call may give, and a dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, networks.WIDTH)
        self.layers = nn.ModuleList([networks.Mlp(), networks.Branches(), networks.Mlp()])
        self.head = nn.Linear(networks.WIDTH, 4)

    def forward(self, x, keep=None):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head((x if keep is None else x * keep).mean(1))


MODELS = {
    "lora": (Masked(), torch.zeros(2, 6, 5), 0.6),
    "feed-forwards": (feedforwards.Net(feedforwards.Plain, feedforwards.Gated),
                      torch.zeros(2, 6, 5), "layers.1"),
    "regions": (stages.STAGES["in place"](), torch.zeros(2, 3, 16, 16), "stage"),
}  # fmt: skip


@cache
def planned(name):
    model, example, split = MODELS[name]
    recipe = replace(RECIPES[name], split=split)
    host = host_of(structural_copy(model.eval()))
    timed = Timer()
    return plan_conversion(host, recipe, host.arguments(example), timed)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_graph_settles_what_was_left_open(name):
    compiler, program = planned(name)
    decided = compiler.decisions
    assert program.mode == "eval"
    assert {site.name for site in program.sites} == decided.sites
    assert decided.split in (program.cut.index, program.cut.label)
    assert isinstance(hash(decided), int) and decided.router is not None
    assert {"capture (eval)", *(p.name for p in passes(name))} <= set(compiler.timed.seconds)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_later_graphs_have_the_same_cut_and_the_same_sites(name, mode):
    compiler, program = planned(name)
    _, example, _ = MODELS[name]
    shape = (5, *example.shape[1:]) if example.ndim == 4 else (5, 9, 5)
    later, emitted = compiler.compile({"x": torch.zeros(shape)}, mode)
    assert later.mode == mode
    assert (later.cut.label, later.cut.index) == (program.cut.label, program.cut.index)
    assert set(later.sites) == set(program.sites) and later.head == program.head
    assert later.names("expert") == program.names("expert")
    assert later.numerics == program.numerics
    assert compiler.decisions.sites == {site.name for site in later.sites}
    assert emitted.cut == later.cut.node and emitted.numerics == later.numerics


def test_a_call_with_another_argument_is_cut_at_the_same_module():
    """However many blocks there are, and whatever share of the FLOPs was asked for."""
    compiler, program = planned("lora")
    given = {"x": torch.zeros(2, 6, 5), "keep": torch.zeros(2, 6, 1)}
    later, _ = compiler.compile(given, "eval")
    assert later.names("user") == {"x", "keep"}
    assert later.cut.label == program.cut.label and set(later.sites) == set(program.sites)


def test_a_graph_without_a_site_that_was_decided_on_is_refused():
    """Its rows are others: of the first argument's means."""

    class Squeezed(Masked):
        def forward(self, x, short=None):
            x = self.embed(x)
            for i, layer in enumerate(self.layers):
                x = layer(x.mean(1, keepdim=True) if i == 2 and short is not None else x)
            return self.head(x)

    host = host_of(structural_copy(Squeezed().eval()))
    recipe = replace(RECIPES["lora"], split=1)
    arguments = {"x": torch.zeros(2, 6, 5)}
    compiler, _ = plan_conversion(host, recipe, arguments, Timer())
    assert "layers.2.up" in compiler.decisions.sites
    with pytest.raises(CaptureError, match=r"arguments \['x', 'short'\].*layers.2.up"):
        compiler.compile(arguments | {"short": torch.zeros(2, 6, 5)}, "eval")


def test_a_model_without_any_site_is_refused_with_the_reasons():
    host = host_of(structural_copy(networks.Network(["Mlp", "Mlp"], tokens=False).eval()))
    recipe = make_recipe(split=1, router=TokenRouter(), experts=LoRAExperts(sites=("nothing",)))
    with pytest.raises(ConversionError, match=r"(?s)no site to convert.*layers\.1\.up: not named"):
        plan_conversion(host, recipe, {"x": torch.zeros(2, 6, 5)}, Timer())


def test_the_model_and_its_modes_are_as_they_were():
    model, example, _ = MODELS["lora"]
    before = copy.deepcopy(model.state_dict())
    flags = {n: m.training for n, m in model.named_modules()}
    compiler, _ = planned("lora")
    compiler.compile({"x": example}, "train")
    assert flags == {n: m.training for n, m in model.named_modules()}
    assert not any(m.training for m in compiler.host.module.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("experts", "router", "fresh"),
    [
        (LoRAExperts(), TokenRouter(), "as routed"),
        (FFNExperts(), TokenRouter(), "as routed"),
        (FFNExperts(), TokenRouter(top_k=1, gate="all"), "no experts"),
        (RegionExperts(), PatchRouter(), "everything"),
        (RegionExperts(halo=False), PatchRouter(), "no experts"),
        (RegionExperts(width=0.5), PatchRouter(), "no experts"),
    ],
)
def test_the_plan_by_which_new_experts_give_what_the_dense_model_gives(experts, router, fresh):
    compiler, _ = planned("lora")
    recipe = make_recipe(router=router, experts=experts)
    decisions = replace(compiler.decisions, router=router)
    assert replace(compiler, recipe=recipe, decisions=decisions).fresh == fresh
