"""Feed-forward experts: found by dataflow, equal to the dense model, and to a plain reference."""

import copy

import architectures
import pytest
import torch
import torch.nn.functional as F
from feedforwards import (
    BODIES,
    Functional,
    Gated,
    Net,
    Plain,
    convert,
    gated_sum,
    inputs,
    steps,
    with_layers,
)  # fmt: skip
from reference import added, randomize
from sweeps import some
from torch import nn
from torch.func import functional_call

import moe_rewrite
from moe_rewrite import FFNExperts, MoeRewriteError, PatchRouter, TokenRouter

D, H = 8, 12
FEW = ("Llama", "GPT2", "ModernBert", "ConvNext", "Albert")


def expert_weights(state, layer, expert):
    """{name in the layer: tensor} of one expert, from the public state dict."""
    prefix = f"moe_rewrite.experts.layers.{layer}.copies.layers.{layer}."
    end = f".{expert}"
    return {k[len(prefix) : -len(end)]: v for k, v in state.items() if k.startswith(prefix) and k.endswith(end)}  # fmt: skip


def routed(model, x, gates, state, base):
    """The definition: every expert on every row, times its gate."""

    def mixed(i, layer, x):
        outs = [layer(x)] if base else []
        outs += [
            functional_call(layer, expert_weights(state, i, e), (x,))
            for e in range(gates.shape[-1] - base)
        ]
        return gated_sum(gates, outs)

    return with_layers(model, x, mixed)


@pytest.mark.parametrize(
    "given",
    [
        {"router": TokenRouter(top_k=2, base=False, init=1.0), "num_experts": 5},
        {"router": TokenRouter(top_k=1, base=False, gate="all", init=1.0), "num_experts": 3},
        {"router": TokenRouter(granularity="prefix"), "mode": "pmoe", "num_experts": 2},
        {"router": TokenRouter(granularity="sequence", top_k=2), "mode": "pmoe", "num_experts": 3},
        {"router": TokenRouter(policy="expert", base=False, init=1.0), "num_experts": 4},
    ],
    ids=["top2", "raw", "prefix", "sequence", "expert-choice"],
)
def test_output_and_gradients_are_the_definitions(given):
    model = Net(*BODIES).eval()
    moe = convert(model, experts=FFNExperts(), **given)
    assert len(moe.report.sites) == len(BODIES)
    randomize(moe, size=0.5)
    assert not moe.report.equivalence or moe.report.equivalence.equal
    for batch, length in ((3, 7), (1, 1), (2, 40)):
        x = inputs(batch, length, seed=length)
        state = {
            k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in added(moe).items()
        }
        plan = moe.route(x)
        gates = plan.gates.expand(batch, length, -1)
        got = moe(x)
        want = routed(model, x, gates, state, moe.router.spec.base)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert (got - model(x)).abs().max() > 1e-3
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
        moe.zero_grad()
        (got * weights).sum().backward()
        rows = list(moe.router.rows)
        by_rows = [r.grad.clone() for r in rows]
        (want * weights).sum().backward()
        wanted = [r.grad - first for r, first in zip(rows, by_rows, strict=True)]
        torch.testing.assert_close(by_rows, wanted, rtol=1e-3, atol=1e-4)
        for name, p in added(moe).items():
            if ".experts." in name:
                grad = state[name].grad
                mine = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(mine, torch.zeros_like(p) if grad is None else grad, rtol=1e-3, atol=1e-4)  # fmt: skip


def test_expert_choice_is_its_definition():
    moe = convert(Net(Gated).eval(), num_experts=4, router=TokenRouter(policy="expert", base=False, capacity=1.5, init=1.0))  # fmt: skip
    x = inputs(3, 8)
    plan = moe.route(x)
    scores = plan.logits.softmax(-1)
    for sample in range(3):
        for expert in range(4):
            best = scores[sample, :, expert].topk(3).indices  # 1.5 * 8 / 4
            kept = plan.weights[sample, :, expert].nonzero().flatten()
            assert set(best.tolist()) == set(kept.tolist())
    assert ("insert experts", "approximate") in moe.report.numerics


@pytest.mark.parametrize("name", some([*architectures.ALL, "Albert", "LlamaClassifier"], FEW))
def test_upcycled_equals_dense_and_an_expert_is_the_model_with_its_weights(name):
    build = architectures.build if name in architectures.ALL else architectures.build_other
    model = build(name)
    moe = moe_rewrite.convert(model, mode="upcycle", split=1, num_experts=2)
    assert moe.report.sites and not moe.report.rejected
    given = architectures.random_call(model, 3)
    report = moe_rewrite.verify(model, moe, given)
    assert report.equal, str(report)
    if name == "Albert":  # whose shallow half runs the same weights
        return
    randomize(moe, size=0.1)
    changed, state = copy.deepcopy(model), added(moe)
    names = {k.split(".copies.")[1][: -len(".1")]: v for k, v in state.items() if k.endswith(".1") and ".copies." in k}  # fmt: skip
    assert names
    with torch.no_grad():
        for key, tensor in names.items():
            changed.get_parameter(key).copy_(tensor)
    with moe.use_expert(1), torch.no_grad():
        report = moe_rewrite.verify(changed, moe, given)
    assert report.equal, str(report)
    assert not moe_rewrite.verify(model, moe, given).equal


class Pointwise(nn.Module):
    """A map whose feed-forward is two 1 x 1 convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.mix = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1, groups=D) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(D, H, 1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(H, D, 1) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            x = x + down(F.silu(up(mix(x))))
        return x.mean((2, 3))


def test_pointwise_convolutions_on_samples_and_on_patches():
    torch.manual_seed(0)
    model, x = Pointwise().eval(), torch.randn(3, 3, 8, 8)
    moe = convert(model, split=1, example_inputs=x, num_experts=4)
    assert len(moe.report.sites) == 1 and moe.report.equivalence.equal
    patches = convert(
        model, split=1, example_inputs=x, num_experts=2,
        router=PatchRouter(grid=4, per_expert=3, gate="hard"),
    )  # fmt: skip
    plan = patches.route(x)
    h = model.stem(x)
    h = h + model.down[0](F.silu(model.up[0](model.mix[0](h))))
    taken = (
        plan.weights.sum(-1).unflatten(1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    want = h + model.down[1](F.silu(model.up[1](model.mix[1](h)))) * taken.unsqueeze(1)
    torch.testing.assert_close(patches(x), want.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert (plan.weights.sum(-1) == 0).any()  # a patch that no expert takes


def test_layers_are_chosen_and_what_is_left_out_has_a_reason():
    model = Net(*[Plain] * 4).eval()
    moe = convert(model, experts=FFNExperts(num=2, every=2))
    assert [s[0] for s in moe.report.sites] == ["layers.4", "layers.8"]
    assert dict(moe.report.rejected)["layers.2"] == "left out by every=2"
    moe = convert(model, experts=FFNExperts(num=2, sites=["layers.6"]))
    assert [s[0] for s in moe.report.sites] == ["layers.6"]
    assert [s[0] for s in convert(model, split="layers.5").report.sites] == ["layers.6", "layers.8"]
    for wrong in ({"every": 0}, {"num": 0}, {"sites": ()}, {"sites": "some"}):
        with pytest.raises(MoeRewriteError, match=f"FFNExperts {next(iter(wrong))}"):
            FFNExperts(**wrong)


class Watched(Plain):
    def forward(self, x):
        h = F.gelu(self.up(x))
        return self.down(h) + h.mean(-1, keepdim=True)


class TwoSources(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(D, H)
        self.down = nn.Linear(H, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(self.norm(x))) * self.up(x))


class Bottleneck(nn.Module):
    """Products with nothing between."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 2), nn.Linear(2, D)

    def forward(self, x):
        return self.b(self.a(x))


def test_what_is_no_feedforward_is_left_alone():
    model = Net(Watched, TwoSources, Bottleneck, Plain).eval()
    moe = convert(model)
    assert [s[0] for s in moe.report.sites] == ["layers.8"]
    assert "inside of the feed-forward" in dict(moe.report.rejected)["layers.2.down"]
    with pytest.raises(MoeRewriteError, match="no site to convert"):
        convert(Net(TwoSources).eval())


def test_upcycling_trains_everything_and_comes_back_from_disk(tmp_path):
    model = Net(Gated, Plain)
    before = copy.deepcopy(model.state_dict())
    moe = convert(model, num_experts=4).train()
    optimizer = torch.optim.Adam(moe.trainable_parameters(), 0.01)
    x, y = inputs(8, 6), torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        out, plan = moe.with_plan(x)
        loss = F.mse_loss(out, y)
        (loss + 0.01 * plan.load_balance_loss() + 0.001 * plan.z_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moved = moe.state_dict()
    assert not torch.equal(moved["embed.weight"], before["embed.weight"])
    moe.eval().save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, model, inputs(2, 6)).eval()
    assert torch.equal(moe(x), back(x)) and back.recipe.mode == "upcycle"


def test_routing_losses_are_their_definitions():
    moe = convert(Net(Plain).eval(), num_experts=4, experts=FFNExperts(router="cut"))
    plan = moe.route(inputs(5, 9))
    p = plan.logits.softmax(-1).reshape(-1, 4)
    top = p.topk(2).indices
    f = torch.stack([(top == e).sum() for e in range(4)]) / top.numel()
    torch.testing.assert_close(plan.load_balance_loss(), 4 * (f * p.mean(0)).sum())
    z = torch.log(plan.logits.exp().sum(-1)).square().mean()
    torch.testing.assert_close(plan.z_loss(), z)
    mask = torch.ones(5, 9)
    mask[:, 4:] = 0
    torch.testing.assert_close(plan.z_loss(mask), torch.log(plan.logits[:, :4].exp().sum(-1)).square().mean())  # fmt: skip
    with pytest.raises(MoeRewriteError, match="TokenRouter"):
        convert(Pointwise(), split=1, example_inputs=torch.randn(2, 3, 8, 8), router="patch").route(torch.randn(2, 3, 8, 8)).z_loss()  # fmt: skip


def test_progressive_copies_leave_the_older_ones_as_they_were():
    model = Net(Gated, Functional).eval()
    moe = convert(model, mode="pmoe", experts=FFNExperts())
    randomize(moe, size=0.3)
    x = inputs(4, 5)
    first = moe(x).detach()
    old = {k: v.detach().clone() for k, v in added(moe).items() if ".experts." in k}
    moe.expand(1, name="second")
    assert torch.equal(moe(x), first)
    steps(moe)
    assert all(torch.equal(added(moe)[k], v) for k, v in old.items())
    assert not torch.equal(moe(x), first)
    moe.remove_last()
    assert torch.equal(moe(x), first)
    with moe.disable_experts():
        torch.testing.assert_close(moe(x), model(x), rtol=1e-5, atol=1e-6)


def test_checkpointed_training_is_the_same():
    moe = convert(Net(Plain, Gated), num_experts=3).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            moe.gradient_checkpointing_enable()
        torch.manual_seed(3)
        moe(inputs(3, 4)).square().sum().backward()
        grads.append([p.grad.clone() for p in moe.trainable_parameters() if p.grad is not None])
        moe.zero_grad()
    assert len(grads[0]) == len(grads[1])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "upcycle", "experts": moe_rewrite.LoRAExperts()},
        {"mode": "upcycle", "router": TokenRouter(policy="expert", base=False), "model": "causal"},
    ],
)
def test_wrong_requests_are_refused(wrong):
    model = architectures.build("Llama") if wrong.pop("model", None) else Net(Plain)
    given = {} if hasattr(model, "config") else {"example_inputs": inputs(2, 3)}
    with pytest.raises(MoeRewriteError, match="experts=|causal"):
        moe_rewrite.convert(model, split=1, **given, **wrong)
    with pytest.raises(MoeRewriteError, match="policy"):
        TokenRouter(policy="expert")
