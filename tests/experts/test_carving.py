"""Carved experts: a feed-forward's own hidden units in groups, of which a row runs a share."""

import architectures
import pytest
import torch
import torch.nn.functional as F
from carvings import Net, Relu, X, carved, first, shaken
from feedforwards import D, Gated, H, Plain, Swapped, gated_sum, with_layers
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_rewrite
from moe_rewrite import CarvedExperts
from moe_rewrite.experts.ffn.grouping import balanced, coactive
from moe_rewrite.passes.lower import ONE_BY_ONE
from moe_rewrite.routing.carve_rule import CarveRule

pytest.importorskip("scipy")

SLOW = ["Gemma3", "OPT", "GPTNeoX", "DistilBert", "Dinov2"]
FAMILIES = ["Llama", "GPT2", "Bert", "ViT"] + [
    pytest.param(n, marks=pytest.mark.sweep) for n in SLOW
]
GROUPINGS = ["coactivation", "magnitude", "random"]


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
            p, f = layer.logits[..., 1:].softmax(-1).mean((0, 1)), layer.gates[..., 1:].mean((0, 1))
            torch.testing.assert_close(layer.load_balance_loss(), 3 * (f / f.sum() * p).sum())


def test_the_report_says_how_experts_are_computed_at_the_share_of_now():
    moe = carved(Net(Gated, Relu).eval())
    at_first = dict(moe.report.lowered)
    assert at_first["layers.3"] == ONE_BY_ONE and " of the time of " in at_first["layers.1"]
    moe.set_active(1.0)
    assert dict(moe.report.lowered)["layers.3"] == ONE_BY_ONE
    assert "every row goes to every expert" in dict(moe.report.lowered)["layers.1"]
    moe.set_active(0.5)
    assert " of the time of " in dict(moe.report.lowered)["layers.1"]
    assert dict(moe.report.lowered)["layers.1"] != at_first["layers.1"]
    moe.set_active(0.75)
    assert dict(moe.report.lowered) == at_first
    plain = carved(Net(Gated).eval(), backend="reference")
    plain.set_active(0.5)
    assert not plain.report.lowered


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
