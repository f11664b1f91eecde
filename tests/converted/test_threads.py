"""One model called from many threads: the results are those of calls one after the other."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import architectures
import pytest
import torch
from reference import randomize

import moe_rewrite

PROMPTS = [torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(i)) for i in range(4)]  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama", layers=2)


@pytest.fixture(scope="module")
def moe(llama):
    made = moe_rewrite.convert(llama, split=1, num_experts=2)
    randomize(made, size=0.5)
    return made


def at_once(work, count):
    """What each of so many threads gives, all of which begin at the same time."""
    start = Barrier(count)

    def begin(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def text(model, prompt):
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def logits(model, prompt, **given):
    return model(prompt, use_cache=False, **given).logits


def test_first_calls_of_different_signatures(llama, moe):
    """Captures come one after the other, and each thread gets its own call's graph."""
    fresh = moe_rewrite.convert(llama, split=1)
    calls = [
        {},
        {"attention_mask": torch.ones(1, 6, dtype=torch.long)},
        {"position_ids": torch.arange(6)[None]},
        {},
    ]
    found = at_once(lambda i: logits(fresh, PROMPTS[i], **calls[i]), 4)
    for i, got in enumerate(found):
        torch.testing.assert_close(got, logits(llama, PROMPTS[i], **calls[i]))
    assert all(m.training is False for m in fresh.host.module.modules())


def test_generation(llama, moe):
    want = [text(moe, p) for p in PROMPTS]
    assert not all(torch.equal(w, text(llama, p)) for w, p in zip(want, PROMPTS, strict=True))
    found = at_once(lambda i: text(moe, PROMPTS[i % 4]), 12)
    assert all(torch.equal(got, want[i % 4]) for i, got in enumerate(found))
    assert "forward" not in vars(moe.host.module)


def test_calls_and_contexts(llama, moe):
    """A context of one thread does not reach the others."""
    alone = [logits(moe, p) for p in PROMPTS]
    with moe.use_expert(1):
        of_one = [logits(moe, p) for p in PROMPTS]
    dense = [logits(llama, p) for p in PROMPTS]

    def work(number):
        prompt, right = PROMPTS[number % 4], []
        for _ in range(5):
            if number % 3 == 0:
                with moe.disable_experts():
                    right.append(torch.allclose(logits(moe, prompt), dense[number % 4], atol=1e-5))
            elif number % 3 == 1:
                with moe.use_expert(1):
                    right.append(torch.equal(logits(moe, prompt), of_one[number % 4]))
            else:
                right.append(torch.equal(logits(moe, prompt), alone[number % 4]))
        return all(right)

    assert all(at_once(work, 8))
    assert torch.equal(logits(moe, PROMPTS[0]), alone[0])


@pytest.mark.parametrize("first_out", [0, 1])
def test_contexts_that_overlap_end_in_any_order(llama, moe, first_out):
    alone, dense = logits(moe, PROMPTS[0]), logits(llama, PROMPTS[0])
    stacks = [ExitStack(), ExitStack()]
    stacks[0].enter_context(moe.use_expert(0))
    stacks[1].enter_context(moe.disable_experts())
    torch.testing.assert_close(logits(moe, PROMPTS[0]), dense)
    stacks[first_out].close()
    left = logits(moe, PROMPTS[0])
    assert torch.allclose(left, dense, atol=1e-5) == (first_out == 0)
    stacks[1 - first_out].close()
    assert torch.equal(logits(moe, PROMPTS[0]), alone)


def test_features_of_one_thread_are_not_anothers(moe):
    want = [logits(moe, p) for p in PROMPTS]
    seen = [moe.features(p, use_cache=False) for p in PROMPTS]

    def work(number):
        with moe.use_features(seen[number % 4]):
            return logits(moe, PROMPTS[number % 4])

    assert all(torch.equal(got, want[i % 4]) for i, got in enumerate(at_once(work, 8)))


def test_conversions(llama):
    found = at_once(lambda _: moe_rewrite.convert(llama, split=1, verify=False), 3)
    for made in found:
        torch.testing.assert_close(logits(made, PROMPTS[0]), logits(llama, PROMPTS[0]))
