"""A converted model under DeepSpeed's ZeRO stage 3 trains as one process does."""

import functools

import processes
import pytest
import sharded_training as sharded
import torch
import zero3_training as zero

import moe_rewrite

pytest.importorskip("deepspeed", reason="DeepSpeed is not among the tests' packages")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.sweep)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    codes, errors = processes.run(zero.__file__, "cases", request.param, folder)
    assert not any(codes), errors
    return torch.load(folder / "found.pt"), folder, request.param


# nobody calls moe.remember, whose absence eval() tells; it changes nothing here
pytestmark = pytest.mark.filterwarnings("ignore:the router knows no rows")


@functools.cache
def one_process(kind, steps, world):
    moe = zero.converted(kind)
    losses, _ = sharded.train(moe, sharded.IDS.chunk(world), steps, rate=zero.RATE)
    return losses, zero.evaluated(moe), moe


@pytest.mark.parametrize("name", zero.CASES)
def test_losses_outputs_and_the_save_are_those_of_one_process(found, name):
    kind, steps, _ = zero.CASES[name]
    losses, _, (logits, tokens) = found[0][name]
    expected, (of_one, tokens_of_one), moe = one_process(kind, steps, found[2])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, of_one, rtol=0, atol=1e-5)
    assert torch.equal(tokens, tokens_of_one)
    assert losses[-1] < losses[0]
    loaded = moe_rewrite.load(found[1] / name, sharded.build(kind if kind != "analytic" else False))
    for (of, a), (_, b) in zip(moe.named_parameters(), loaded.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=of)


@pytest.mark.parametrize("name", zero.CASES)
def test_no_process_holds_weights_between_steps(found, name):
    assert found[0][name][1] == []


def test_what_zero_cannot_do_is_refused_by_name(found):
    refused = found[0]["refused"]
    assert "expand it, then call deepspeed.initialize" in refused["expand"]
    assert "before it is sharded" in refused["remove"]
    assert "leave that out, a converted model needs none" in refused["leaf module"]
    assert "gradient_checkpointing_disable()" in refused["checkpointing"]
