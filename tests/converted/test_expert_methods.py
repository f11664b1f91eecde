"""Experts that are removed, renamed, frozen, merged and activated by weights."""

import architectures
import pytest
import torch
from networks import Residual
from reference import added, randomize
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, MoeRewriteError, RegionExperts, TokenRouter

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def converted(experts=None, router="auto", names=("a", "b", "c")):
    moe = moe_rewrite.convert(
        Residual().eval(), split=1, example_inputs=X, verify=False, experts=experts, router=router
    )
    moe.rename(0, names[0])
    for name in names[1:]:
        moe.expand(name=name)
        moe.activate(name)
    randomize(moe)
    return moe


def call(moe):
    with torch.no_grad():
        return moe(X)


KINDS = {"lora": LoRAExperts(2), "ffn": FFNExperts()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_any_expert_is_removed_and_the_others_stay_bitwise(kind, gone):
    moe = converted(KINDS[kind])
    left = [n for n in "abc" if n != gone]
    index = moe.expert_index(gone)
    before = added(moe)
    moe.deactivate(gone)
    want = call(moe)
    moe.remove(gone)
    assert moe.names == left and torch.equal(call(moe), want)
    kept = {k: v for k, v in before.items() if k.endswith(tuple("012")) and ".before." not in k}
    for name, tensor in kept.items():
        stem, _, number = name.rpartition(".")
        if int(number) != index:
            now = added(moe)[f"{stem}.{int(number) - (int(number) > index)}"]
            assert now is tensor or torch.equal(now, tensor), name
    moe.remove_last()  # the record fits the rows that are left
    assert moe.names == left[:1] and moe.router.active.tolist() == [True]
    with pytest.raises(MoeRewriteError, match="the only expert cannot be removed"):
        moe.remove(0)


def test_an_analytic_router_is_solved_as_if_the_removed_expert_had_never_been():
    router = TokenRouter(fit="analytic", projection=8)
    both = []
    for names in (("a", "b", "c"), ("a", "c")):
        moe = converted(router=router, names=names)
        for i, name in enumerate("abc"):
            if name in names:
                moe.fit_router(name, [X * (i + 1)])
        both.append(moe)
    both[0].remove("b")
    for mine, other in zip(both[0].router.rows, both[1].router.rows, strict=True):
        torch.testing.assert_close(mine, other)


def test_names_and_frozen_experts_are_kept(tmp_path):
    moe = converted(router="token")
    moe.rename("c", "third")
    moe.freeze("third")
    assert not [n for n, p in moe.named_parameters() if p.requires_grad and ".experts." in n]
    moe.train()
    assert moe(X).requires_grad  # the router learns
    moe.eval()
    assert moe.trained == [False] * 3
    moe.save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, moe.to_dense(), X, verify=False)
    assert back.names == ["a", "b", "third"]
    assert not [n for n, p in back.named_parameters() if p.requires_grad and ".experts." in n]
    back.freeze("third", False)
    on = {n for n, p in back.named_parameters() if p.requires_grad and ".experts." in n}
    assert on and all(n.endswith(".2") for n in on)
    for wrong in ("a", ""):
        with pytest.raises(MoeRewriteError, match="expected a name that no expert has"):
            moe.rename("b", wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_activated_by_weights(kind):
    moe = converted(KINDS[kind])
    with moe.use_experts({"a": 0.25, "c": 0.5}):
        plan, mixed = moe.route(X), call(moe)
    assert plan.active == (0, 2) and plan.gates[0, 0].tolist() == [0.25, 0.25, 0.0, 0.5]
    with moe.use_plan(plan):
        assert torch.equal(call(moe), mixed)
    with moe.use_experts({"b": 1}):
        one = call(moe)
    with moe.use_expert("b"):
        assert torch.equal(call(moe), one) and not torch.equal(one, mixed)
    with pytest.raises(MoeRewriteError, match="weight of 'a'=-1: expected a number >= 0"):
        moe.use_experts({"a": -1})


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_is_merged_into_a_dense_model(kind):
    moe = converted(KINDS[kind])
    merged = moe.merge_expert("b", X)
    with moe.use_expert("b"):
        torch.testing.assert_close(merged(X), call(moe), rtol=1e-5, atol=1e-5)
    assert type(merged) is Residual and all(p.requires_grad for p in merged.parameters())
    shared = {p.data_ptr() for p in moe.parameters()}
    assert not shared & {p.data_ptr() for p in merged.parameters()}
    assert not torch.allclose(merged(X), moe.to_dense()(X))


@pytest.mark.sweep
def test_a_hugging_face_model_with_an_expert_merged_in():
    dense = architectures.build("GPT2")  # weights stored as (in, out)
    moe = moe_rewrite.convert(dense, split=1, verify=False)
    randomize(moe)
    merged, ids = moe.merge_expert(0), torch.arange(12).view(2, 6)
    assert type(merged) is type(dense) and not isinstance(merged, moe_rewrite.MoEModel)
    with moe.use_expert(0), torch.no_grad():
        want = moe(ids).logits
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_what_no_dense_weight_can_do_is_not_merged():
    normed = Residual().eval()
    nn.utils.parametrizations.weight_norm(normed.layers[2][1])
    moe = moe_rewrite.convert(normed, split=1, example_inputs=X, verify=False)
    randomize(moe)
    with pytest.raises(MoeRewriteError, match="stands beside|another map"):
        moe.merge_expert(0, X)
    maps = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))).eval()
    options = {"experts": RegionExperts(halo=False), "example_inputs": torch.randn(2, 3, 8, 8)}
    moe = moe_rewrite.convert(maps, split=1, verify=False, **options)
    with pytest.raises(MoeRewriteError, match="patches"):
        moe.merge_expert(0, options["example_inputs"])
