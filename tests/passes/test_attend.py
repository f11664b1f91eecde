"""Attention is called without a mask where a call's own mask says nothing, with the same bits."""

import functools

import pytest
import torch
import torch.nn.functional as F

import moe_rewrite
from moe_rewrite.passes import attend
from moe_rewrite.passes.attend import CAUSAL, read_mask
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some

PADDING = {"none": (0, 0), "left": (3, 0), "right": (0, 3), "both": (2, 1)}


def lower(rows, diagonal=0):
    return torch.ones(rows, rows, dtype=torch.bool).tril(diagonal)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("lead", [(), (1, 1), (3, 1), (2, 4)])
def test_masks_that_say_nothing_are_known(rows, lead):
    shape = (*lead, rows, rows)
    assert read_mask(torch.ones(shape, dtype=torch.bool), torch.float32) is None
    assert read_mask(lower(rows).expand(shape), torch.float32) == (CAUSAL if rows > 1 else None)
    assert read_mask(torch.ones(*lead, rows, rows + 5, dtype=torch.bool), torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [(0, 0), (-1, 0), (0, -1), (-1, -1), (3, 5), (5, 3)])
def test_any_other_mask_is_numbers(change, dtype):
    for mask in (lower(7), torch.ones(7, 7, dtype=torch.bool)):
        mask = mask.expand(3, 1, 7, 7).clone()
        mask[1, 0][change] ^= True
        made = read_mask(mask, dtype)
        if isinstance(made, str) or made is None:
            pytest.fail(f"{change} of a mask is not seen")
        assert made.dtype == dtype
        assert torch.equal(made == 0, mask) and torch.equal(made == float("-inf"), ~mask)


def test_rows_that_follow_others_are_numbers():
    """Causal of 3 rows after 4 positions: the kernel would count from the first position."""
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    assert isinstance(read_mask(mask, torch.float32), torch.Tensor)


@functools.cache
def fresh(name):
    """Dense and converted: the same function."""
    dense = architectures.build(name)
    return dense, moe_rewrite.convert(dense, split=1, num_experts=2, verify=False)


@functools.cache
def converted(name, dtype=torch.float32):
    """With experts that add something."""
    dense = architectures.build(name).to(dtype)
    moe = moe_rewrite.convert(dense, split=1, num_experts=2, verify=False)
    randomize(moe, size=0.5)
    return moe


def rows(length, padding="none", batch=2):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 97, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    left, right = PADDING[padding]
    mask[0, :left] = 0
    mask[-1, length - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both_ways(run, monkeypatch):
    """What a call returns, and what it returns where no mask is looked at."""
    made = run()
    with monkeypatch.context() as patched:
        patched.setattr(attend, "_is_readable", lambda mask: False)
        return made, run()


def require_same_bits(made, wanted):
    for one, other in zip(made, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


NAMES = some(
    ["Llama", "GPT2", "Mistral", "Gemma3", "Qwen3", "Bert", "ModernBert"],
    {"Llama", "Gemma3", "Bert"},
)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_with_and_without(name, padding, monkeypatch):
    moe = converted(name)

    @torch.no_grad()
    def run():
        return [moe(**rows(length, padding, batch)).logits for length, batch in [(5, 2), (14, 3)]]

    require_same_bits(*both_ways(run, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", some(["Llama", "Mistral", "Gemma3"], {"Gemma3"}))
def test_gradients_are_the_same_bits(name, padding, dtype, monkeypatch):
    moe = converted(name, dtype)
    given = rows(13, padding)
    labels = given["input_ids"].where(given["attention_mask"] == 1, -100)

    def run():
        torch.manual_seed(0)
        moe.train()
        try:
            loss = moe(**given, labels=labels).loss
            return loss.detach(), *torch.autograd.grad(loss, moe.trainable_parameters())
        finally:
            moe.eval()

    require_same_bits(*both_ways(run, monkeypatch))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", some(["Llama", "Mistral", "Gemma3", "Qwen3"], {"Gemma3"}))
def test_a_cache_is_read_with_the_same_bits(name, padding, monkeypatch):
    """A prompt, several rows after it, and one by one."""
    moe = converted(name)
    given = rows(19, padding)

    @torch.no_grad()
    def run():
        cache, made = None, []
        for begin, end in [(0, 11), (11, 14), (14, 15), (15, 16), (16, 19)]:
            mask = given["attention_mask"][:, :end]
            out = moe(
                input_ids=given["input_ids"][:, begin:end], attention_mask=mask,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            made.append(out.logits)
        return made

    require_same_bits(*both_ways(run, monkeypatch))


@pytest.fixture
def asked(monkeypatch):
    """What PyTorch's function is asked for: "none", "causal" or "numbers" a call."""
    seen, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        seen.append("numbers" if attn_mask is not None else "causal" if is_causal else "none")
        return plain(q, k, v, attn_mask, dropout_p, is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_each_call_is_judged_by_itself(asked, mode):
    """Full attention in layer 2, a window of 6 in the others (Gemma 3's configuration)."""
    moe = converted("Gemma3")
    moe.train(mode == "train")
    try:
        for length, padding, wanted in [
            (14, "left", {"numbers"}), (5, "none", {"causal"}), (6, "none", {"causal"}),
            (7, "none", {"numbers"}), (5, "right", {"numbers"}), (5, "none", {"causal"}),
        ]:  # fmt: skip
            moe(**rows(length, padding))  # which may capture, and compare with the dense model
            asked.clear()
            moe(**rows(length, padding))
            assert len(asked) == 3 and set(asked) == wanted, (length, padding)
    finally:
        moe.eval()


@torch.no_grad()
def test_tokens_after_a_prompt_need_no_mask(asked):
    moe = converted("Llama")
    for padding, wanted in [("none", ["causal"] * 3 + ["none"] * 6), ("left", ["numbers"] * 9)]:
        generate = functools.partial(
            moe.generate, **rows(9, padding), max_new_tokens=3, min_new_tokens=3,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        generate()
        asked.clear()
        generate()
        assert asked == wanted


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", some(["Llama", "Mistral", "Gemma3"], {"Mistral"}))
def test_the_dense_model_says_the_same(name, padding):
    dense, moe = fresh(name)
    for length, batch in [(4, 2), (17, 3)]:
        given = rows(length, padding, batch)
        counted = given["attention_mask"].bool()
        torch.testing.assert_close(
            moe(**given).logits[counted], dense(**given).logits[counted], rtol=0, atol=1e-5
        )


def test_a_step_of_training_keeps_no_mask():
    moe = converted("Llama")
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    ids = rows(21)["input_ids"]
    moe.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = moe(input_ids=ids, labels=ids).loss
        loss.backward()
    finally:
        moe.eval()
    assert kept and not [shape for shape in kept if shape[-2:] == (21, 21)]
