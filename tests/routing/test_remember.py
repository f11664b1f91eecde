"""Rows of language models: padding is left out, and a model writes itself what it could do."""

import architectures
import pytest
import torch

import moe_rewrite
from moe_rewrite import TokenRouter


@pytest.fixture(scope="module")
def moe():
    router = TokenRouter(fit="analytic", granularity="prefix", projection=64)
    return moe_rewrite.convert(
        architectures.build("Llama", layers=2), split=1, router=router, verify=False
    )


def test_a_language_model_writes_what_it_could_do_before(moe):
    moe.train()
    before = torch.random.get_rng_state()
    moe.remember(texts=6, length=8)
    assert moe.training and torch.equal(before, torch.random.get_rng_state())
    once = moe.router.moments[0].clone()
    assert 6 * 2 <= once[-1, -1] <= 6 * 8
    with torch.no_grad():
        for tensor in moe.trainable_parameters():
            tensor.add_(1.0)  # the frozen model writes, not its experts
    moe.remember(texts=6, length=8)
    torch.testing.assert_close(moe.router.moments[0], 2 * once)
    with pytest.raises(ValueError, match="length=1"):
        moe.remember(length=1)


def test_rows_are_those_that_attention_counts_with_and_without_a_loss(moe):
    """A prompt has no loss, but is routed too."""
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[:2, 6:] = 0
    labels[mask == 0] = -100
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    moe.train()(**batch).loss.backward()
    taken = moe.router.moments[1].clone()
    assert taken[-1, -1] == mask.sum()
    moe.fit_router(0, [batch])
    torch.testing.assert_close(taken, moe.router.moments[1])
