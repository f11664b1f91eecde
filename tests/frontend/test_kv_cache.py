"""Caches that generation takes back positions of, and those that graphs cannot use."""

import pytest
import torch

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter
from moe_rewrite.frontend.kv_cache import KEPT, RouterState
from moe_rewrite.routing.plan import PrefixState
from tests.helpers import architectures
from tests.helpers.reference import randomize


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


@pytest.mark.parametrize("seed", range(3))
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


def test_caches_that_graphs_cannot_use_are_named(moe):
    with pytest.raises(MoeRewriteError, match="StaticCache: only a DynamicCache"):
        generated(moe, 0, cache_implementation="static")
    with pytest.raises(MoeRewriteError, match="offloads its layers"):
        generated(moe, 0, cache_implementation="offloaded")
