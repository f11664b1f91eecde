"""A conversion changes nothing, shares everything, and does what a plain implementation does."""

import copy

import pytest
import torch
from reference import added, hooked, randomize

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter


def ids_and_mask(batch, length, pad=False, vocab=512, seed=0):
    generator = torch.Generator().manual_seed(seed + batch * 100 + length)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad and length > 2:
        for row in range(batch):
            mask[row, : row % (length - 1)] = 0
    return ids, mask


@pytest.fixture(scope="module")
def moe(stories):
    return moe_rewrite.convert(stories, split=3)


@pytest.mark.parametrize("expanded", [False, True])
def test_stories_logits_are_the_dense_models(stories, expanded):
    moe = moe_rewrite.convert(stories, split=3)
    if expanded:
        moe.expand(3)
    for batch in (1, 3, 5):
        for length in (1, 7, 64):
            for pad in (None, False, True):
                ids, mask = ids_and_mask(batch, length, pad)
                kwargs = (
                    {"input_ids": ids}
                    if pad is None
                    else {"input_ids": ids, "attention_mask": mask}
                )
                with torch.no_grad():
                    dense, ours = stories(**kwargs).logits, moe(**kwargs).logits
                assert torch.equal(dense[mask == 1], ours[mask == 1]), (batch, length, pad)


@pytest.mark.parametrize("granularity, top_k", [("token", None), ("token", 2), ("prefix", None)])
def test_experts_do_what_plain_hooks_do(stories, granularity, top_k):
    router = TokenRouter(granularity=granularity, top_k=top_k)
    moe = moe_rewrite.convert(stories, split=3, router=router, num_experts=3)
    randomize(moe)
    state = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in moe.state_dict().items()
             if k.startswith("moe_rewrite.")}  # fmt: skip
    plain = lambda: hooked(stories, "model.layers.2", state, 2.0, granularity, top_k)  # noqa: E731
    for batch, length, pad in ((1, 1, False), (3, 7, True), (2, 33, True)):
        ids, mask = ids_and_mask(batch, length, pad)
        with plain():
            want = stories(input_ids=ids, attention_mask=mask).logits
        got = moe(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask == 1], want[mask == 1], rtol=1e-4, atol=1e-4)
        dense = stories(input_ids=ids, attention_mask=mask).logits
        assert (got - dense)[mask == 1].abs().max() > 0.1  # routing matters
    got[mask == 1].square().mean().backward()
    want[mask == 1].square().mean().backward()
    own = added(moe)
    for name, p in state.items():
        if p.grad is not None and name in own and own[name].requires_grad:
            scale = p.grad.abs().max().item()
            torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-3, atol=1e-3 * scale)
            assert p.grad.abs().sum() > 0 or "router" in name
    assert all(p.grad is None for p in moe.shallow.parameters())


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.3}])
def test_generation_with_experts_equals_plain_hooks_without_cache(stories, how):
    moe = moe_rewrite.convert(stories, split=3, num_experts=3)
    randomize(moe)
    state = {k: v.detach() for k, v in moe.state_dict().items()}
    ids, mask = ids_and_mask(3, 6, pad=True)
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 25, "pad_token_id": 0}
    kwargs |= {"do_sample": False} | how
    torch.manual_seed(3)
    got = moe.generate(**kwargs)
    with hooked(stories, "model.layers.2", state, 2.0, "prefix"):
        torch.manual_seed(3)
        want = stories.generate(**kwargs, use_cache=False)
    assert torch.equal(got, want)
    torch.manual_seed(3)
    assert not torch.equal(got, stories.generate(**kwargs))  # the experts change what is said


def test_generation_is_the_dense_models_own(stories, moe):
    ids, mask = ids_and_mask(2, 5, pad=True)
    for how in ({}, {"num_beams": 3}, {"do_sample": True}):
        kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 30, "pad_token_id": 0}
        kwargs |= {"do_sample": False} | how
        torch.manual_seed(0)
        want = stories.generate(**kwargs)
        torch.manual_seed(0)
        assert torch.equal(moe.generate(**kwargs), want)


def test_learning_a_second_expert_leaves_everything_else_alone(stories):
    moe = moe_rewrite.convert(stories, split=3)
    randomize(moe)
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    ids, mask = ids_and_mask(4, 24)
    new = moe.expand(1, name="task")
    text = moe.generate(
        input_ids=ids[:1, :5], attention_mask=mask[:1, :5], max_new_tokens=20, do_sample=False
    )
    optimizer = torch.optim.AdamW(new, lr=3e-2)
    moe.train()
    losses = []
    for _ in range(40):
        loss = moe(input_ids=ids, attention_mask=mask, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in moe.shallow.parameters())
    after = moe.state_dict()
    for name, old in before.items():
        if "router.active" not in name and "router.pending" not in name:
            assert torch.equal(old, after[name]), name
    moe.eval()
    moe.deactivate("task")
    again = moe.generate(
        input_ids=ids[:1, :5], attention_mask=mask[:1, :5], max_new_tokens=20, do_sample=False
    )
    assert torch.equal(text, again)
    moe.remove_last()
    assert {k: v.shape for k, v in moe.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    for name, value in moe.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_labels_hidden_states_and_embeddings_are_honoured(stories, moe):
    ids, mask = ids_and_mask(3, 9)
    with torch.no_grad():
        for kwargs in (
            {"input_ids": ids, "labels": ids},
            {"input_ids": ids, "output_hidden_states": True},
            {"input_ids": ids, "return_dict": False, "use_cache": False},
            {"inputs_embeds": stories.get_input_embeddings()(ids), "attention_mask": mask},
            {"input_ids": ids, "logits_to_keep": 2},
            {"input_ids": ids, "position_ids": torch.arange(4, 13).expand(3, 9)},
        ):
            want, got = stories(**kwargs), moe(**kwargs)
            assert type(want) is type(got)
            for a, b in zip(want, got, strict=True):
                if isinstance(a, str):
                    a, b = want[a], got[a]
                for x, y in zip(
                    *((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True
                ):
                    if isinstance(x, torch.Tensor):
                        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    with pytest.raises(moe_rewrite.MoeRewriteError, match="input_idz"):
        moe(input_idz=ids)


def test_storage_is_shared_and_the_original_unchanged(stories):
    flags = [p.requires_grad for p in stories.parameters()]
    before = copy.deepcopy(stories.state_dict())
    moe = moe_rewrite.convert(stories, split=3)
    state = moe.state_dict()
    for name, tensor in stories.state_dict().items():
        assert state[name].data_ptr() == tensor.data_ptr(), name
    moe.to(torch.bfloat16)
    assert stories.dtype == torch.float32 and not stories.training
    assert flags == [p.requires_grad for p in stories.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in stories.state_dict().items())
    ids, mask = ids_and_mask(2, 6)
    half = copy.deepcopy(stories).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(moe(input_ids=ids).logits, half(input_ids=ids).logits)
    assert moe.to_dense() is stories
    other = copy.deepcopy(moe)
    randomize(other)
    with torch.no_grad():
        assert torch.equal(moe(input_ids=ids).logits, half(input_ids=ids).logits)
        assert not torch.equal(other(input_ids=ids).logits, half(input_ids=ids).logits)


def test_checkpointing_gives_the_same_gradients(stories):
    moe = moe_rewrite.convert(stories, split=2, num_experts=2)
    randomize(moe)
    ids, mask = ids_and_mask(2, 12)
    grads = []
    for enable in (False, True):
        if enable:
            moe.gradient_checkpointing_enable()
        moe.train()
        moe.zero_grad()
        moe(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in moe.trainable_parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_save_and_load(stories, tmp_path):
    moe = moe_rewrite.convert(stories, split=3, num_experts=2, experts=LoRAExperts(rank=4))
    moe.expand(1, name="late")
    randomize(moe)
    moe.save_pretrained(tmp_path / "a")
    moe.save_pretrained(tmp_path / "a")  # again, over the first
    back = moe_rewrite.load(tmp_path / "a", stories)
    ids, _ = ids_and_mask(2, 9)
    for _ in ("off", "on"):
        with torch.no_grad():
            assert torch.equal(moe(input_ids=ids).logits, back(input_ids=ids).logits)
        moe.activate("late"), back.activate("late")
    file = next((tmp_path / "a").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(moe_rewrite.MoeRewriteError, match="truncated"):
        moe_rewrite.load(tmp_path / "a", stories)
    moe.save_pretrained(tmp_path / "b")
    other = copy.deepcopy(stories)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(moe_rewrite.MoeRewriteError, match="another base model"):
        moe_rewrite.load(tmp_path / "b", other)
    meta = tmp_path / "b" / "moe_rewrite.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(moe_rewrite.MoeRewriteError, match="format 9"):
        moe_rewrite.load(tmp_path / "b", stories)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"split": 99}, "split=99.*model.layers.4"),
        ({"split": 1.5}, "between 0 and 1"),
        ({"split": "model.layers.77"}, "dotted name"),
        ({"mode": "moe"}, "mode='moe'"),
        ({"router": "tokens"}, "router='tokens'"),
        ({"experts": 8}, "experts=8"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"router": TokenRouter(granularity="sequence")}, "look ahead"),
        ({"example_inputs": {"pixels": torch.zeros(2, 3)}}, "could not be captured"),
        ({"experts": LoRAExperts(sites=["nothing"])}, "no site to convert"),
    ],
)
def test_bad_input_is_named(stories, options, words):
    with pytest.raises(moe_rewrite.MoeRewriteError, match=f"(?s){words}"):
        moe_rewrite.convert(stories, **options)


def test_second_conversion_is_refused(moe):
    with pytest.raises(moe_rewrite.MoeRewriteError, match="converted already"):
        moe_rewrite.convert(moe)
