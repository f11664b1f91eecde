"""Routers of layers: gates as transformers' classes define them, losses, and a model that has them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feedforwards import (
    Fused,
    Gated,
    Net,
    Plain,
    Swapped,
    computes_its_definition,
    convert,
    gated_sum,
    inputs,
    with_layers,
)  # fmt: skip
from reference import added, randomize
from torch.func import functional_call
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

import moe_rewrite
from moe_rewrite import FFNExperts, MoeRewriteError, PatchRouter, TokenRouter
from moe_rewrite.routing.layer_plan import GateRule, LayerPlan, LayerView, layer_logits

D, E = 8, 5
CLASSES = {
    "mixtral": (MixtralConfig, MixtralTopKRouter, {"num_local_experts": E}, True, "softmax"),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeTopKRouter, {"num_experts": E}, False, "softmax"),
    "qwen3_moe": (
        Qwen3MoeConfig, Qwen3MoeTopKRouter, {"num_local_experts": E, "norm_topk_prob": True},
        True, "softmax",
    ),
    "olmoe": (OlmoeConfig, OlmoeTopKRouter, {"num_experts": E}, False, "softmax"),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeTopkRouter, {"n_routed_experts": E}, True, "sigmoid"),
    "glm4_moe, not renormalised": (
        Glm4MoeConfig, Glm4MoeTopkRouter, {"n_routed_experts": E, "norm_topk_prob": False},
        False, "sigmoid",
    ),
}  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("name", CLASSES)
def test_gates_are_those_of_transformers_classes(name, top_k):
    config, kind, experts, normalized, score = CLASSES[name]
    torch.manual_seed(0)
    router = kind(config(hidden_size=D, num_experts_per_tok=top_k, **experts))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(7, 3, D)
    with torch.no_grad():
        logits, taken, chosen = router(x)
    want = torch.zeros(21, E).scatter(1, chosen, taken).view(7, 3, E)
    rule = GateRule(top_k, normalized, score)
    got = layer_logits(LayerView(tuple(range(E)), rule), x, list(router.weight.detach()), -1)
    torch.testing.assert_close(got.flatten(0, 1), logits)
    gates, k = rule.gates(got)
    assert k == top_k
    torch.testing.assert_close(gates, want, rtol=1e-6, atol=1e-7)
    opened, k = rule.gates(got, spare=top_k)
    torch.testing.assert_close(opened, want, rtol=1e-6, atol=1e-7)


def definition(model, x, state, experts, top_k):
    """Every expert on every row, times the gate that the layer's rows give its input."""

    def mixed(i, layer, x):
        site = f"moe_rewrite.experts.layers.{i}."
        own = [
            {k: state[f"{site}copies.layers.{i}.{k}.{e}"] for k, _ in layer.named_parameters()}
            for e in range(experts)
        ]
        rows = torch.stack([state[f"{site}rows.{e}"] for e in range(experts)])
        low = (x @ rows.T).topk(top_k).values[..., -1:]
        gates = (x @ rows.T).masked_fill(x @ rows.T < low, float("-inf")).softmax(-1)
        outs = [functional_call(layer, of, (x,)) for of in own]
        return gated_sum(gates, outs)

    return with_layers(model, x, mixed)


def test_outputs_and_gradients_are_the_definitions():
    model = Net(Plain, Gated, Fused).eval()
    moe = convert(model, num_experts=4)
    assert moe.report.equivalence.equal and "one a layer" in str(moe.report)
    assert moe.recipe.experts.router == "layer" and len(moe.report.sites) == 3
    randomize(moe, size=0.5)
    for batch, length in ((3, 7), (1, 1), (2, 40)):
        x = inputs(batch, length, seed=length)
        got = computes_its_definition(moe, lambda x, state: definition(model, x, state, 4, 2), x)
        assert (got - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_plan_has_the_layers_plans_and_their_losses(score):
    moe = convert(Net(Plain, Gated).eval(), num_experts=4, experts=FFNExperts(score=score))
    x = inputs(5, 9)
    out, plan = moe.with_plan(x)
    assert list(plan.layers) == ["layers.2", "layers.4"]
    for of in plan.layers.values():
        p = of.logits.softmax(-1) if score == "softmax" else of.logits.sigmoid()
        p = (p / p.sum(-1, keepdim=True)).reshape(-1, 4)
        f = F.one_hot(p.topk(2).indices, 4).float().sum(1).mean(0) / 2
        torch.testing.assert_close(of.load_balance_loss(), 4 * (f * p.mean(0)).sum())
        z = of.logits.exp().sum(-1).log().square()
        torch.testing.assert_close(of.z_loss(), z.mean())
        mask = torch.ones(5, 9)
        mask[:, 4:] = 0
        torch.testing.assert_close(of.z_loss(mask), z[:, :4].mean())
        assert torch.allclose(of.gates.sum(-1), torch.ones(5, 9))
    losses = torch.stack([of.load_balance_loss() for of in plan.layers.values()])
    torch.testing.assert_close(plan.load_balance_loss(), losses.mean())
    with pytest.raises(AttributeError, match=r"plan.layers\[name\].gates"):
        _ = plan.gates
    with moe.use_plan(plan):
        assert torch.equal(moe(x), out)
    with moe.disable_experts():
        torch.testing.assert_close(moe(x), Net(Plain, Gated).eval()(x))
        with pytest.raises(MoeRewriteError, match="no expert was on"):
            moe.route(x).z_loss()


def test_rows_in_other_places_than_those_at_the_cut_route_too():
    model = Net(Swapped).eval()
    moe = convert(model, num_experts=3)
    assert moe.report.sites and moe.report.equivalence.equal


def test_gates_that_do_not_sum_to_one_are_declared_approximate():
    model, x = Net(Gated).eval(), inputs(3, 4)
    router = TokenRouter(top_k=1, gate="all", base=False, normalize=False, init=0.5)
    moe = convert(model, num_experts=3, router=router, experts=FFNExperts(router="layer"))
    assert ("insert experts", "approximate") in moe.report.numerics
    assert (moe(x) - model(x)).abs().max() > 1e-3
    with moe.use_expert(2):
        torch.testing.assert_close(moe(x), model(x))


def test_experts_come_go_and_are_saved(tmp_path):
    model, x = Net(Gated, Plain).eval(), inputs(4, 5)
    moe = convert(model, num_experts=3)
    randomize(moe, size=0.3)
    first, old = moe(x).detach(), {k: v.clone() for k, v in added(moe).items()}
    new = moe.expand(1, name="more")
    assert torch.equal(moe(x), first) and any(p.shape == (D,) for p in new)
    moe.train()
    optimizer = torch.optim.SGD(moe.trainable_parameters(), 0.1)
    for _ in range(3):
        moe(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moe.eval()
    copies = [k for k in old if ".copies." in k]
    assert all(torch.equal(added(moe)[k], old[k]) for k in copies)
    assert not torch.equal(moe(x), first)
    moe.save_pretrained(tmp_path, save_only_added=False)
    again = convert(model, num_experts=3)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(x), moe(x)) and again.names == moe.names
    back = moe_rewrite.load(tmp_path, model, inputs(2, 6))
    assert torch.equal(back(x), moe(x)) and back.recipe == moe.recipe
    moe.remove_last()
    assert all(torch.equal(v, old[k]) for k, v in added(moe).items() if "rows" in k)
    moved = copy.deepcopy(moe).double()
    torch.testing.assert_close(moved(x.double()), moe(x).double(), rtol=1e-4, atol=1e-5)


def test_any_expert_is_removed_merged_or_weighed():
    model, x = Net(Gated, Plain).eval(), inputs(4, 5)
    moe = convert(model, num_experts=4)
    randomize(moe, size=0.3)
    with moe.use_expert(2):
        alone = moe(x).detach()
    torch.testing.assert_close(moe.merge_expert(2, inputs(2, 6))(x), alone)
    with moe.use_experts({0: 0.25, 2: 0.75}):
        plan = moe.route(x)
        assert all(p.gates[0, 0].tolist() == [0.25, 0, 0.75, 0] for p in plan.layers.values())
    moe.deactivate(1)
    off = moe(x).detach()
    moe.remove(1)
    assert torch.equal(moe(x), off) and moe.num_experts == 3
    moe.remove_last()
    with moe.use_expert(1):
        assert torch.equal(moe(x), alone)


def test_saves_of_versions_without_layers_routers_have_theirs_at_the_cut():
    saved = convert(Net(Gated).eval(), experts=FFNExperts(router="cut")).recipe.to_dict()
    assert saved["experts"].pop("router") == "cut"
    saved["experts"].pop("score")
    recipe = moe_rewrite.passes.recipe.Recipe.from_dict(saved)
    assert recipe.experts.router == "cut" and recipe.mode == "upcycle"


def test_checkpointed_training_is_the_same():
    moe = convert(Net(Gated, Plain), num_experts=3).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            moe.gradient_checkpointing_enable()
        torch.manual_seed(3)
        out, plan = moe.with_plan(inputs(3, 4))
        (out.square().sum() + plan.load_balance_loss() + plan.z_loss()).backward()
        grads.append([p.grad.clone() for p in moe.trainable_parameters() if p.grad is not None])
        moe.zero_grad()
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("given, said", [
    ({"router": "patch"}, "router='patch'"), ({"router": PatchRouter()}, "a TokenRouter with"),
    ({"router": TokenRouter(granularity="prefix")}, "TokenRouter granularity='prefix'"),
    ({"router": TokenRouter(base=True, normalize=False)}, "TokenRouter base=True"),
    ({"router": TokenRouter(base=False)}, "TokenRouter normalize=True"),
    ({"router": TokenRouter(base=False, normalize=False, top_k=1)}, "top_k=1"),
])  # fmt: skip
def test_options_that_no_layers_router_has_are_refused(given, said):
    with pytest.raises(MoeRewriteError, match=said):
        convert(Net(Gated).eval(), experts=FFNExperts(router="layer"), **given)


def test_wrong_options_are_named():
    for wrong in ({"router": "layers"}, {"score": "tanh"}):
        with pytest.raises(MoeRewriteError, match=f"FFNExperts {next(iter(wrong))}"):
            FFNExperts(**wrong)
    with pytest.raises(MoeRewriteError, match="FFNExperts score='sigmoid'"):
        convert(Net(Gated).eval(), experts=FFNExperts(router="cut", score="sigmoid"))
    assert LayerPlan((), 2, GateRule(2, True, "softmax")).layers == {}
