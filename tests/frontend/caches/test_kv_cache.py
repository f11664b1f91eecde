"""Caches that generation takes back positions of, and those that graphs cannot use."""

import pytest
import torch
from transformers import StaticCache

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter
from moe_rewrite.frontend.caches.kv_cache import KEPT, RouterState
from moe_rewrite.routing.plan import PrefixState
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some


@pytest.fixture(scope="module", params=["prefix", "token"])
def moe(request):
    model = architectures.build("Llama", layers=4)
    router = TokenRouter(granularity=request.param)
    made = moe_rewrite.convert(model, split=2, router=router, num_experts=2)
    randomize(made, size=0.5)
    return made


def generated(model, seed, **options):
    torch.manual_seed(seed)
    ids = torch.randint(3, 97, (1, 5 + seed))
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=30, min_new_tokens=30, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", some(range(3), {0}))
def test_assisted_decoding_says_the_same(moe, seed):
    want = generated(moe, seed)
    assistant = architectures.build("Llama", layers=1)
    assert torch.equal(generated(moe, seed, prompt_lookup_num_tokens=4), want)
    assert torch.equal(generated(moe, seed, assistant_model=assistant), want)


@pytest.mark.parametrize("lengths", [(KEPT + 36,), (KEPT,), (7, 5), (KEPT + 1, 3), (1, 1)])
def test_a_state_goes_back_position_by_position(lengths):
    steps = torch.randn(2, sum(lengths), 3)
    totals, counts = steps.cumsum(1), torch.arange(1.0, 1 + sum(lengths)).expand(2, -1)
    last = min(lengths[-1], KEPT)
    for removed in {1, last // 2 or 1, last}:
        state, at = RouterState(), 0
        for length in lengths:
            now = slice(at, at + length)
            at += length
            given = PrefixState(
                totals[:, at - 1], counts[:, at - 1], totals[:, now], counts[:, now]
            )
            state.store(given, at)
        state.crop(-removed)
        left = at - removed
        assert state.length == left
        want = totals[:, left - 1] if left else torch.zeros(2, 3)
        assert torch.equal(state.total, want)
        assert torch.equal(state.count, torch.full((2,), float(left)))
        if removed < last:
            state.crop(-1)
            assert state.length == left - 1
    with pytest.raises(MoeRewriteError, match="taken back by"):
        state.crop(-KEPT - 2)


def test_a_static_cache_says_the_same_with_one_graph_for_all_lengths(moe):
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for length, options in ((4, {}), (6, {"num_beams": 2}), (5, {"max_cache_len": 40})):
        given = {"attention_mask": mask, "max_new_tokens": length, "pad_token_id": 0}
        static = {"cache_implementation": "static", **options}
        said = moe.generate(ids, **given, **static, do_sample=False)
        options.pop("max_cache_len", None)
        assert torch.equal(said, moe.generate(ids, **given, **options, do_sample=False))
        with moe.disable_experts():
            said = moe.generate(ids, **given, **static, do_sample=False)
        assert torch.equal(said, moe.to_dense().generate(ids, **given, **options, do_sample=False))
    graphs = [g for kept in moe._graphs._kept.values() for g in kept]
    fixed = [
        g for g in graphs if g.emitted.steps and f"{moe.host.cache_name}_8" in g.conditions.leaves
    ]
    assert len(fixed) == 1


@pytest.mark.sweep
def test_windows_of_attention_are_kept_in_a_static_cache():
    model = architectures.build("Mistral")
    made = moe_rewrite.convert(model, split=1)
    ids = torch.randint(3, 97, (1, 9))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": 0}
    want = model.generate(ids, **given, do_sample=False)
    got = made.generate(ids, **given, do_sample=False, cache_implementation="static")
    assert torch.equal(got, want)


def test_a_static_cache_that_is_full_refuses_more(moe):
    cache = moe._cache_format().new_static(2, 6)
    ids = torch.randint(3, 97, (2, 4))
    with torch.no_grad():
        first = moe(input_ids=ids, past_key_values=cache)
        assert first.past_key_values is cache
        assert cache.get_seq_length() == 4
        with pytest.raises(MoeRewriteError, match="3 more positions after 4.* room for 6"):
            moe(input_ids=ids[:, :3], past_key_values=cache)
        with pytest.raises(MoeRewriteError, match="a batch of 1 with a static cache for 2"):
            moe(input_ids=ids[:1, :1], past_key_values=cache)
        cache.reset()
        again = moe(input_ids=ids, past_key_values=cache)
    assert torch.equal(again.logits, first.logits)


def test_a_static_cache_goes_back_once_for_all_layers(moe):
    ids = torch.randint(3, 97, (2, 6))
    with torch.no_grad():
        want = moe(input_ids=ids, use_cache=True).logits[:, 4:]
        cache = moe._cache_format().new_static(2, 6)
        given = {moe.host.cache_name: cache}
        moe(input_ids=torch.cat([ids[:, :4], ids[:, :2]], 1), **given)
        cache.crop(-2)
        assert cache.get_seq_length() == 4
        torch.testing.assert_close(moe(input_ids=ids[:, 4:], **given).logits, want)


def test_a_cache_goes_by_the_names_that_the_dense_model_takes(moe):
    name, ids = moe.host.cache_name, torch.randint(3, 97, (1, 4))
    cache = moe._cache_format().new(1)
    other = "past_key_values" if name == "cache" else "cache"
    with torch.no_grad():
        if name == "cache":  # the older name is another for it
            assert moe(input_ids=ids, **{other: cache})[name] is cache
            with pytest.raises(MoeRewriteError, match="are one argument"):
                moe(input_ids=ids, **{name: cache, other: cache})
        else:
            with pytest.raises(MoeRewriteError, match=f"takes no argument {other}"):
                moe(input_ids=ids, **{other: cache})


def test_caches_that_graphs_cannot_use_are_named(moe):
    ids = torch.randint(3, 97, (1, 4))
    theirs = StaticCache(moe.config, max_cache_len=8)
    with torch.no_grad(), pytest.raises(MoeRewriteError, match="StaticCache.*keep every position"):
        moe(input_ids=ids, past_key_values=theirs)
    with pytest.raises(MoeRewriteError, match="offloads its layers"):
        generated(moe, 0, cache_implementation="offloaded_static")
