"""Carved experts: a feed-forward's own hidden units in groups, of which a row runs a share."""

import json

import architectures
import pytest
import torch
import torch.nn.functional as F
from feedforwards import D, Fused, Gated, H, Mixed, Plain, Swapped, Tanh, gated_sum, with_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import moe_rewrite
from moe_rewrite import CarvedExperts, FFNExperts, TokenRouter
from moe_rewrite.errors import CheckpointError, ConfigError, ConversionError, InputError
from moe_rewrite.experts.ffn.grouping import balanced, coactive
from moe_rewrite.routing.carve_rule import CarveRule

pytest.importorskip("scipy")

SLOW = ["Gemma3", "OPT", "GPTNeoX", "DistilBert", "Dinov2"]
FAMILIES = ["Llama", "GPT2", "Bert", "ViT"] + [
    pytest.param(n, marks=pytest.mark.sweep) for n in SLOW
]
GROUPINGS = ["coactivation", "magnitude", "random"]
X = [
    torch.randn(b, n, 5, generator=torch.Generator().manual_seed(n))
    for b, n in ((3, 7), (1, 1), (2, 40))
]


class Relu(nn.Module):
    """Without biases, stored (in, out), of which most hidden units are off."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Parameter(torch.randn(D, 24) / 3), nn.Parameter(torch.randn(24, D) / 3)

    def forward(self, x):
        return torch.relu(x @ self.a - 0.5) @ self.c


class Net(nn.Module):
    """Feed-forwards of these kinds, and what mixes positions between."""

    def __init__(self, *bodies, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        kinds = [kind for body in bodies for kind in (Mixed, body)]
        self.embed, self.layers = nn.Linear(5, D), nn.ModuleList(kind() for kind in kinds)
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def carved(model, calibration=None, **options):
    experts = {"experts": 4, "active": 0.75} | options.pop("of", {})
    calibration = calibration or [torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(9))]
    return moe_rewrite.convert(
        model, "carve", experts=CarvedExperts(calibration=calibration, **experts),
        example_inputs=X[0], **options,
    )  # fmt: skip


def shaken(model):
    """Biases and norms that are not those of a fresh model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))


def llama(share=0.75, experts=4, **options):
    """A carved Llama and the dense one."""
    model = architectures.build("Llama", layers=1)
    spec = CarvedExperts(experts, active=share, calibration=[{"input_ids": IDS}])
    return moe_rewrite.convert(model, "carve", experts=spec, **options), model


def first(outputs):
    return next(t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_expert_on_outputs_are_the_dense_models(name):
    model = shaken(architectures.build(name, layers=1 if name == "Llama" else 3))
    calls = [architectures.random_call(model, 4) for _ in range(2)]
    experts = CarvedExperts(experts=4, shared=1, active=0.5, calibration=calls)
    moe = moe_rewrite.convert(model, "carve", experts=experts)
    assert moe.report.equivalence.equal and not moe.report.rejected
    assert len(moe.report.sites) == (1 if name == "Llama" else 3)
    for batch in (1, 3):
        given = architectures.random_call(model, batch)
        with torch.no_grad():
            want, few = first(model(**given)), first(moe(**given))
            with moe.dense_plan():
                every = first(moe(**given))
            with moe.disable_experts():
                dense = first(moe(**given))
            moe.set_active(1.0)
            whole = first(moe(**given))
            moe.set_active(0.5)
        torch.testing.assert_close(every, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole, every, rtol=0, atol=0)
        torch.testing.assert_close(dense, want, rtol=1e-5, atol=1e-5)
        assert (few - want).abs().max() > 1e-5  # experts were left out


def definition(model, moe, x, state, shared, routed):
    """Each row's hidden units that the routers take, and the bias of the last product, once."""
    sites = {s.site.name: s for s in moe.expert_sites()}

    def mixed(i, layer, x):
        name = f"moe_rewrite.experts.layers.{i}."
        site = sites[f"layers.{i}"]
        rows = torch.stack(
            [state[f"{name}rows.{e}"] for e in range(shared + site_routed(site, shared))]
        )
        scores = F.linear(x, rows[:, :-1], rows[:, -1])
        low = scores[..., shared:].topk(routed).values[..., -1:]
        gates = torch.cat(
            [torch.ones_like(scores[..., :shared]), (scores[..., shared:] >= low).float()], -1
        )
        gates = gates + (scores - scores.detach()) * gates
        bias = dict(layer.named_parameters()).get("down.bias")
        outs = []
        for e in range(len(rows)):
            own = {
                k: state.get(f"{name}copies.layers.{i}.{k}.{e}")
                for k, _ in layer.named_parameters()
            }
            own = {k: v for k, v in own.items() if v is not None}
            outs.append(without_down_bias(layer, own, x))
        return gated_sum(gates, outs) + (0 if bias is None else bias)

    return with_layers(model, x, mixed)


def site_routed(site, shared):
    return len(site.rows) - shared


def without_down_bias(layer, own, x):
    if isinstance(layer, Relu):
        return torch.relu(x @ own["a"] - 0.5) @ own["c"]
    if isinstance(layer, Gated):
        up = F.linear(x, own["up.weight"], own["up.bias"])
        return F.linear(F.silu(F.linear(x, own["gate.weight"])) * up, own["down.weight"])
    act = F.hardswish if isinstance(layer, Swapped) else F.gelu
    return F.linear(act(F.linear(x, own["up.weight"], own["up.bias"])), own["down.weight"])


@pytest.mark.parametrize(("experts", "shared", "active", "bodies"), [
    (4, 1, 0.75, (Plain, Gated, Swapped, Relu)), (6, 2, 0.5, (Gated,)), (3, 0, 1 / 3, (Relu,)),
])  # fmt: skip
def test_outputs_and_gradients_are_the_definitions(experts, shared, active, bodies):
    model = Net(*bodies).eval()
    moe = carved(model, of={"experts": experts, "shared": shared, "active": active})
    with torch.no_grad():
        for p in moe.trainable_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    routed = round(active * experts) - shared
    for x in X:
        named = {k: p for k, p in moe.named_parameters() if k.startswith("moe_rewrite.experts.")}
        state = {k: p.detach().clone().requires_grad_() for k, p in named.items()}
        moe.zero_grad()
        got, want = moe(x), definition(model, moe, x, state, shared, routed)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        for name, p in named.items():
            if p.requires_grad:
                no = torch.zeros_like(p)
                mine, of = no if p.grad is None else p.grad, state[name].grad
                torch.testing.assert_close(mine, no if of is None else of, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_hidden_units_are_divided_among_experts_in_the_order_that_is_kept(grouping):
    model = Net(Plain, Gated, Relu).eval()
    moe = carved(model, of={"grouping": grouping})
    dense = dict(model.named_parameters())
    for site in moe.expert_sites():
        order, size = site.order, len(site.order) // 4
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        stacks = dict(zip(site.parts, site.stacked(range(4)), strict=True))
        for part in site.site.parts:
            ((dim, kept),) = part.kept
            assert kept == size and "down.bias" not in part.name
            whole = torch.cat([t.detach() for t in stacks[part.name]], dim)
            assert torch.equal(whole, dense[part.name].index_select(dim, order))


def test_shared_units_contribute_most_and_routers_are_ridge_regressions():
    model = Net(Relu).eval()
    data = torch.randn(8, 50, 5, generator=torch.Generator().manual_seed(4))
    moe = carved(model, [data], of={"shared": 1})
    layer = model.layers[1]
    with torch.no_grad():
        x = model.embed(data)
        x = (x + model.layers[0](x)).flatten(0, 1)
        hidden = torch.relu(x @ layer.a - 0.5)
    (site,) = moe.expert_sites()
    strength = (hidden.abs() * layer.c.norm(dim=1)).mean(0).detach()
    assert set(site.order[:6].tolist()) == set(strength.topk(6).indices.tolist())
    groups = site.order.view(4, 6)
    norms = torch.stack([(hidden[:, g] @ layer.c[g]).norm(dim=1) for g in groups], 1).detach()
    wide = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram = wide.T @ wide
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    want = torch.linalg.solve(gram, wide.T @ (norms / norms.mean()).double()).T
    torch.testing.assert_close(
        torch.stack(list(site.rows)).detach(), want.float(), rtol=1e-3, atol=1e-4
    )


def test_padding_does_not_count_as_calibration():
    model = architectures.build("Llama", layers=1)
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    rows = []
    for odd in (5, 60):
        calls = [{"input_ids": ids.masked_fill(mask == 0, odd), "attention_mask": mask}]
        spec = CarvedExperts(4, calibration=calls)
        moe = moe_rewrite.convert(model, "carve", experts=spec, verify=False)
        rows.append([torch.stack(list(s.rows)).detach() for s in moe.expert_sites()])
    for a, b in zip(*rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep  # docs/carve.md does so in every run
@pytest.mark.parametrize("seed", [0, 3])
def test_a_language_model_calibrates_on_texts_that_it_writes(seed):
    model = architectures.build("Llama", layers=1)
    moe = moe_rewrite.convert(model, "carve", experts=CarvedExperts(4, seed=seed), verify=False)
    (site,) = moe.expert_sites()
    torch.manual_seed(seed)
    start = torch.ones(128, 1, dtype=torch.int64)
    with torch.no_grad():
        written = [
            model.generate(
                input_ids=part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0,
                max_new_tokens=63, pad_token_id=0,
            )
            for part in start.split(64)
        ]  # fmt: skip
    calls = [{"input_ids": ids, "attention_mask": until_end(ids)} for ids in written]
    again = CarvedExperts(4, seed=seed, calibration=calls)
    (other,) = moe_rewrite.convert(model, "carve", experts=again, verify=False).expert_sites()
    assert torch.equal(site.order, other.order)
    assert moe.generate(input_ids=torch.tensor([[1, 5]]), max_new_tokens=3).shape == (1, 5)


def until_end(ids):
    """1 up to a text's end token."""
    ended = (ids[:, 1:] == 2).long()
    after = ended.cumsum(1) - ended
    return torch.cat([torch.ones_like(ids[:, :1]), (after == 0).long()], 1)


def test_the_report_counts_the_active_share_of_multiply_adds():
    moe = carved(Net(Gated, Plain).eval())
    dense = {"layers.1": 3 * D * H, "layers.3": 2 * D * H}
    for share in (0.75, 0.5):
        moe.set_active(share)
        for name, whole in dense.items():
            macs = moe.report.macs_of[name]
            assert (macs.dense, macs.experts, macs.router) == (whole, share * whole, 4 * D)
        assert moe.report.macs.experts == share * 5 * D * H
        assert f"{round(share * 4) - 1} of the others" in str(moe.report)
        plan = moe.route(X[2])
        for layer in plan.layers.values():
            assert set(layer.gates.unique().tolist()) == {0.0, 1.0}
            assert (layer.gates.sum(-1) == share * 4).all() and (layer.gates[..., 0] == 1).all()


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_training_lowers_the_loss_and_saves_load_bitwise(freeze, tmp_path):
    model = Net(Plain, Gated)
    moe = carved(model, freeze=freeze)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    order = [s.order.clone() for s in moe.expert_sites()]
    x, goal = X[2], torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(moe.train().trainable_parameters(), 0.02)
    losses = []
    for _ in range(20):
        out, plan = moe.with_plan(x)
        loss = (out - goal).square().mean()
        (loss + 0.01 * plan.load_balance_loss() + 1e-4 * plan.z_loss()).backward()
        assert all(s.rows[1].grad.any() for s in moe.expert_sites())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moe.eval().set_active(0.5)
    moe.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "moe_rewrite.json").read_text())["recipe"]["experts"]
    assert said["active"] == 0.5 and "calibration" not in said
    again = moe_rewrite.load(tmp_path, model.eval(), example_inputs=X[0])
    with torch.no_grad():
        assert all(torch.equal(again(x), moe(x)) for x in X)
    assert all(torch.equal(a.order, b) for a, b in zip(again.expert_sites(), order, strict=True))
    (tmp_path / "moe_rewrite.json").write_text("{}")
    with pytest.raises(CheckpointError):
        moe_rewrite.load(tmp_path, model, example_inputs=X[0])


@pytest.mark.parametrize(
    "lowering",
    ["sparse", *(pytest.param(n, marks=pytest.mark.sweep) for n in ("dense", "contrib"))],
)
def test_an_exported_file_takes_the_same_experts(lowering, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    moe = carved(Net(Tanh, Gated).eval())
    file = tmp_path / "carved.onnx"
    moe_rewrite.export_onnx(moe, file, lowering=lowering, example_inputs=X[0])
    session = ort.InferenceSession(file)
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    for x in X:
        with torch.no_grad():
            want = moe(x)
        got = torch.from_numpy(session.run([out.name], {given.name: x.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="fixed"):
        moe_rewrite.export_onnx(moe, tmp_path / "x.onnx", open_experts=True, example_inputs=X[0])


@pytest.mark.parametrize(("options", "words"), [
    ({"experts": 1}, "experts=1"), ({"shared": 8}, "shared=8: expected an int from 0 to 7"),
    ({"active": 0.7}, "0.625 or 0.75"), ({"active": 0.125}, "0.25 at least"), ({"active": 0.0}, "active=0.0"),
    ({"grouping": "best"}, "grouping='best'"), ({"seed": -1}, "seed=-1"), ({"ridge": 0}, "ridge=0"),
    ({"sites": []}, "sites"),
])  # fmt: skip
def test_wrong_options_are_refused_before_any_work(options, words):
    with pytest.raises(ConfigError, match=words):
        CarvedExperts(**options)


def test_what_cannot_be_carved_is_refused_with_the_reason():
    model = architectures.build("Llama", layers=1)

    def refused(error, words, model=model, experts=None, **options):
        with pytest.raises(error, match=words):
            moe_rewrite.convert(model, **({"mode": "carve"} | options), experts=experts)

    refused(
        ConversionError,
        "hidden width 48 has no 5 parts.*are 4 and 6",
        experts=CarvedExperts(5, active=0.8),
    )
    small = {"example_inputs": X[0]}
    refused(
        ConversionError, "gate and up in one tensor", Net(Fused).eval(), CarvedExperts(4), **small
    )
    refused(ConversionError, "not named in sites", experts=CarvedExperts(4, sites=("mlp.x",)))
    refused(ConfigError, "writes texts itself", Net(Plain).eval(), CarvedExperts(4), **small)
    refused(ConfigError, "'auto' with CarvedExperts", router=TokenRouter())
    refused(ConfigError, "the 8 of CarvedExperts", num_experts=4)
    refused(ConfigError, "'carve' with CarvedExperts", experts=CarvedExperts(), mode="pmoe")
    refused(ConfigError, "CarvedExperts.* with mode='carve'", experts=FFNExperts())
    ids = torch.ones(2, 9, dtype=torch.int64)
    refused(InputError, "this is one batch", experts=CarvedExperts(4, calibration=ids))
    refused(InputError, "read no row", experts=CarvedExperts(4, calibration=[]))
    odd = Net(Plain).eval()
    with pytest.raises(InputError, match="infinities or NaN"):
        carved(odd, [torch.full((2, 3, 5), float("nan"))])
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    refused(
        ConversionError, "no site", conv, CarvedExperts(4), example_inputs=torch.randn(2, 3, 9, 9)
    )


def test_what_a_carved_model_cannot_do_is_refused(tmp_path):
    moe, _ = llama()
    for call in (moe.expand, moe.remove_last, lambda: moe.remove(1)):
        with pytest.raises(ConfigError, match="own hidden units"):
            call()
    with pytest.raises(ConfigError, match="0.5 or 0.75"):
        moe.set_active(0.6)
    with pytest.raises(ConfigError, match="mode='carve'"):
        moe_rewrite.convert(Net(Plain).eval(), example_inputs=X[0]).set_active(0.5)
    with pytest.raises(ConversionError, match="2 chosen experts sum to one.*shared=2.*bias=False"):
        moe.save_standard(tmp_path)
    moe.set_active(0.5)
    with pytest.raises(ConversionError, match="adds a bias.*shared=1, active=0.5, bias=False"):
        moe.save_standard(tmp_path)
    with pytest.raises(ConversionError, match="CarvedExperts"):
        moe.save_pretrained(tmp_path, standalone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("base", "format", "shared"), [
    ("Llama", "qwen2_moe", 2), pytest.param("Qwen2", "glm4_moe", 1, marks=pytest.mark.sweep),
    pytest.param("SmolLM", "glm4_moe", 2, marks=pytest.mark.sweep),
    pytest.param("Llama", "mixtral", 0, marks=pytest.mark.sweep),
    pytest.param("Qwen3", "qwen3_moe", 0, marks=pytest.mark.sweep),
    pytest.param("GLM", "glm4_moe", 2, marks=pytest.mark.sweep),
])  # fmt: skip
def test_one_chosen_expert_beside_shared_ones_is_a_standard_checkpoint(
    base, format, shared, tmp_path
):
    from standard import IDS, dense, logits, train
    from transformers import AutoModelForCausalLM

    options = {"experts": 4, "shared": shared, "active": (shared + 1) / 4, "bias": False}
    spec = CarvedExperts(calibration=[{"input_ids": IDS}], **options)
    moe = moe_rewrite.convert(dense(base), "carve", experts=spec)
    train(moe)
    assert moe.save_standard(tmp_path / "out", format) == format
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (1, 17, 40):
        torch.testing.assert_close(logits(again, length), logits(moe, length), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConversionError, match="no shared expert"):
        if not shared:
            raise ConversionError("no shared expert")
        moe.save_standard(tmp_path / "no", "mixtral")
    assert not (tmp_path / "no").exists()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_assignments_are_balanced_and_no_exchange_is_better(groups, size, seed):
    scores = torch.randn(
        groups * size, groups, generator=torch.Generator().manual_seed(seed)
    ).double()
    of = balanced(scores)
    assert (of.bincount(minlength=groups) == size).all()
    mine = scores.gather(1, of[:, None])[:, 0]
    gain = scores[:, of].T - mine  # (j, i): what i gains in the group of j
    assert (gain + gain.T <= 1e-9).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_units_that_are_alike_form_a_group(groups, size, seed, shuffled):
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.eye(groups).repeat_interleave(size, 0) * 10
    place = (
        torch.randperm(groups * size, generator=draw) if shuffled else torch.arange(groups * size)
    )
    noise = 0.01 * torch.randn(groups * size, groups, generator=draw)
    of = coactive((kinds + noise)[place], groups, draw)
    assert (of.bincount(minlength=groups) == size).all()
    for group in range(groups):
        assert len({int(p) // size for p in place[of == group]}) == 1


def test_the_rule_takes_shared_experts_that_are_on_and_the_best_of_the_others():
    rule = CarveRule(2, 1)
    logits = torch.tensor([[-9.0, -9.0, 0.5, 0.7], [9.0, 9.0, 0.2, 0.2]])
    assert rule.among((0, 1, 2, 3)).gates(logits)[0].tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]
    gates, k = rule.among((1, 2, 3)).gates(logits[:, 1:])
    assert k == 2 and gates.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert rule.among((2, 3)).gates(logits[:, 2:])[1] == 1
