"""The real pretrained Llama: exact after conversion, right with experts, and it learns."""

import copy
import json

import pytest
import torch
from conversions import fresh
from reference import added, assert_gradients_equal, copied, hooked, randomize
from sweeps import some

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.routing import token_gate

CUT = "model.layers.2"  # the last shallow block of split=3


def ids_and_mask(batch, length, pad=False, seed=0):
    generator = torch.Generator().manual_seed(seed + batch * 100 + length)
    ids = torch.randint(3, 512, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad and length > 2:
        for row in range(batch):
            mask[row, : row % (length - 1)] = 0
    return ids, mask


@pytest.fixture(scope="module")
def moe(stories):
    return fresh(stories, split=3)


@pytest.fixture(scope="module")
def three(stories):
    """Three experts and a router of random values."""
    moe = fresh(stories, split=3, num_experts=3)
    randomize(moe)
    return moe


@pytest.mark.parametrize("expanded", some([False, True], [True]))
def test_logits_are_the_dense_models_bitwise(stories, expanded):
    moe = fresh(stories, split=3)
    if expanded:
        moe.expand(3)
    for batch in (1, 3, 5):
        for length in (1, 7, 64):
            for pad in (None, False, True):
                ids, mask = ids_and_mask(batch, length, pad)
                given = {"input_ids": ids} | ({} if pad is None else {"attention_mask": mask})
                with torch.no_grad():
                    dense, ours = stories(**given).logits, moe(**given).logits
                assert torch.equal(dense[mask == 1], ours[mask == 1]), (batch, length, pad)


def compare_with_hooks(stories, moe, granularity="prefix", top_k=None):
    state = copied(moe)
    moe.zero_grad()
    for batch, length, pad in ((1, 1, False), (3, 7, True), (2, 33, True)):
        ids, mask = ids_and_mask(batch, length, pad)
        with hooked(stories, CUT, state, 2.0, granularity, top_k):
            want = stories(input_ids=ids, attention_mask=mask).logits[mask == 1]
        got = moe(input_ids=ids, attention_mask=mask).logits[mask == 1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.square().mean().backward()
    want.square().mean().backward()
    assert_gradients_equal(moe, state)
    assert all(p.grad is None for p in moe.shallow.parameters())


@pytest.mark.parametrize(
    ("granularity", "top_k"),
    [
        pytest.param("token", None, marks=pytest.mark.sweep),
        pytest.param("token", 2, marks=pytest.mark.sweep),
        ("prefix", 2),
    ],
)
def test_experts_do_what_plain_hooks_do(stories, granularity, top_k):
    router = TokenRouter(granularity=granularity, top_k=top_k)
    moe = moe_rewrite.convert(stories, split=3, router=router, num_experts=3)
    randomize(moe)
    compare_with_hooks(stories, moe, granularity, top_k)


def test_the_comparison_fails_without_the_routing(stories, three, monkeypatch):
    compare_with_hooks(stories, three)
    monkeypatch.setattr(token_gate, "_gate", lambda z, *_: torch.full_like(z, 1 / z.shape[-1]))
    with pytest.raises(AssertionError, match="not close"):
        compare_with_hooks(stories, three)


HOW = [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.3}]


def generated(model, how, pad=True, **more):
    """Seeded generation from left-padded prompts."""
    ids, mask = ids_and_mask(3, 6, pad)
    torch.manual_seed(3)
    given = {"max_new_tokens": 25, "pad_token_id": 0, "do_sample": False} | how | more
    return model.generate(input_ids=ids, attention_mask=mask, **given)


@pytest.mark.parametrize("how", HOW)
def test_generation_is_the_dense_models_own(stories, moe, how):
    assert torch.equal(generated(moe, how), generated(stories, how))


@pytest.mark.parametrize("how", HOW)
def test_generation_with_experts_is_that_of_hooks_without_a_cache(stories, three, how):
    got = generated(three, how)
    with hooked(stories, CUT, copied(three), 2.0, "prefix"):
        assert torch.equal(got, generated(stories, how, use_cache=False))
    assert torch.equal(got, generated(three, how, use_cache=False))
    assert not torch.equal(got, generated(stories, how))  # the experts change the text


def test_saved_experts_generate_the_same_text(stories, three, tmp_path):
    three.save_pretrained(tmp_path)
    back = moe_rewrite.load(tmp_path, stories)
    assert torch.equal(generated(back, {}), generated(three, {}))
    ids, mask = ids_and_mask(2, 9, pad=True)
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=ids, attention_mask=mask).logits for m in (back, three)))


def test_a_second_expert_learns_a_task_and_nothing_else_changes(stories, data):
    """Text of TRACE's FOMC; the first expert and every dense weight stay bitwise what they were."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    records = json.loads((data / "data" / "TRACE" / "FOMC" / "train.json").read_text())[:32]
    texts = [tokenizer(r["prompt"] + r["answer"])["input_ids"][-96:] for r in records]
    ids = torch.tensor([t for t in texts if len(t) == 96])
    assert len(ids) > 8

    moe = fresh(stories, split=3, router=TokenRouter(granularity="prefix"))
    randomize(moe)
    original = copy.deepcopy(stories.state_dict())
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    says = generated(moe, {})
    new = moe.expand(1, name="fomc")
    optimizer = torch.optim.AdamW(new, lr=1e-2)
    moe.train()
    losses = []
    for step in range(40):
        batch = ids[torch.arange(step * 4, step * 4 + 4) % len(ids)]
        loss = moe(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert all(p.grad is None for p in moe.shallow.parameters())
    flags = {f"moe_rewrite.{n}" for n in ("router.active", "router.pending", "_extra_state")}
    after = moe.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k not in flags)
    assert all(torch.equal(v, original[k]) for k, v in stories.state_dict().items())

    moe.eval()
    assert not torch.equal(generated(moe, {}), says)
    moe.deactivate("fomc")
    assert torch.equal(generated(moe, {}), says)
    moe.deactivate(0)
    assert torch.equal(generated(moe, {}), generated(stories, {}))  # the dense model's greedy text
    moe.activate(0)
    moe.remove_last()
    assert {k: torch.equal(v, before[k]) for k, v in moe.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert added(moe).keys() <= before.keys()
