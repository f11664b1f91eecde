"""Cached features at the cut: the same losses, without running the shallow segment."""

import json
import os

import architectures
import cnns
import pytest
import torch
import words
from conversions import fresh
from reference import randomize
from sweeps import some
from torch.utils.flop_counter import FlopCounterMode

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter
from moe_rewrite.continual.features import FeatureCache
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.errors import CheckpointError

PROBLEM = TextProblem(words.Letters(), 32)


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama", layers=2)


def routed(model, **options):
    moe = fresh(model, split=1, verify=False, **options)
    randomize(moe)
    return moe


def batches():
    tasks = words.stream()
    return [PROBLEM.batch(t.train[i : i + 8]) for t in tasks for i in (0, 8, 4)]


def gradients(moe, batch):
    moe.zero_grad()
    loss = PROBLEM.loss(moe, batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in moe.trainable_parameters()]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_losses_and_gradients_are_the_same(llama, tmp_path, where, mode):
    moe = routed(llama)
    getattr(moe, mode)()
    cache = FeatureCache(moe, tmp_path if where == "disk" else None, 2**22)
    ran = []
    for _ in range(2):
        for batch in batches():
            want_loss, want = gradients(moe, batch)
            features = cache.features(PROBLEM.inputs(batch))
            with moe.use_features(features):
                loss, got = gradients(moe, batch)
            assert abs(loss - want_loss) < 1e-5
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        ran.append(cache.misses)
    assert ran[0] == ran[1] == len(cache) <= 3 * 24  # every sample once, whatever its batch


def test_shallow_blocks_do_not_run(llama):
    moe = routed(llama, router=TokenRouter(granularity="prefix"))
    batch = PROBLEM.inputs(batches()[0]) | {"use_cache": False}
    features = moe.features(**batch)
    with FlopCounterMode(display=False) as whole:
        moe(**batch)
    with FlopCounterMode(display=False) as shallow:
        moe.features(**batch)
    with moe.use_features(features), FlopCounterMode(display=False) as rest:
        moe(**batch)
    with moe.use_features(features), FlopCounterMode(display=False) as router:
        moe.route(**batch)
    assert shallow.get_total_flops() > 0.2 * whole.get_total_flops()
    assert rest.get_total_flops() == whole.get_total_flops() - shallow.get_total_flops()
    assert router.get_total_flops() < 0.05 * shallow.get_total_flops()


def test_images_too():
    model = cnns.build("ResNet")
    moe = moe_rewrite.convert(model, split="layer3", router=TokenRouter(granularity="sequence"))
    randomize(moe)
    x = torch.randn(6, 3, 32, 32)
    cache = FeatureCache(moe)
    with torch.no_grad(), moe.use_features(cache.features({"x": x})):
        got = moe(x=x)
    torch.testing.assert_close(got, moe(x=x), rtol=1e-4, atol=1e-5)
    cache.features({"x": x.flip(0)})
    assert (cache.hits, cache.misses) == (6, 6)


def test_a_later_run_reuses_the_file_and_recomputes_damaged_samples(llama, tmp_path):
    moe, batch = routed(llama), PROBLEM.inputs(batches()[0])
    first = FeatureCache(moe, tmp_path, 2**20)
    want = first.features(batch)
    del first
    again = FeatureCache(moe, tmp_path, 2**20)
    assert torch.equal(again.features(batch), want) and again.misses == 0
    del again
    index = next(tmp_path.glob("*.jsonl"))
    at = json.loads(index.read_text().splitlines()[2])["at"]
    with open(next(tmp_path.glob("*.bin")), "r+b") as file:
        file.seek(at)
        file.write(b"\xff\xfe\xfd\xfc")
    index.write_text(index.read_text()[:-20])  # a line cut off in the middle
    damaged = FeatureCache(moe, tmp_path, 2**20)
    assert torch.equal(damaged.features(batch), want) and damaged.misses == 2
    other = routed(architectures.with_dropout(architectures.build("Llama"), 0.0))
    with torch.no_grad():
        next(iter(other.to_dense().parameters())).add_(1.0)
    assert FeatureCache(other, tmp_path, 2**20).features(batch).shape == want.shape
    assert len(list(tmp_path.glob("*.bin"))) == 2  # another model's features are not these


def test_two_caches_of_one_file_append_in_turn(llama, tmp_path):
    moe = routed(llama)
    first, second, third = (PROBLEM.inputs(b) for b in batches()[:3])
    one, two = (FeatureCache(moe, tmp_path, 2**20) for _ in range(2))
    plain = FeatureCache(moe)
    for cache, batch in ((one, first), (two, second), (one, third), (two, first), (one, second)):
        assert torch.equal(cache.features(batch), plain.features(batch))
    later = FeatureCache(moe, tmp_path, 2**20)
    for batch in (first, second, third):
        assert torch.equal(later.features(batch), plain.features(batch))
    assert later.misses == 0


def edited(line, **changes):
    return json.dumps(json.loads(line) | changes)


EDITS = [
    lambda line, other: edited(line, key=json.loads(other)["key"]),
    lambda line, other: edited(line, at=json.loads(other)["at"]),
    lambda line, other: edited(line, dtype="int32"), lambda line, other: edited(line, dtype="save"),
    lambda line, other: edited(line, shape=[-1]), lambda line, other: edited(line, size=-4),
    lambda line, other: json.dumps({"key": "a"}), lambda line, other: "[" * 100_000,
    lambda line, other: line.replace("crc", "CRC"), lambda line, other: "\xff\xfe",
]  # fmt: skip


@pytest.mark.parametrize("edit", some(EDITS, EDITS[::3]))
def test_an_index_that_was_edited_gives_no_wrong_features(llama, tmp_path, edit):
    moe, batch = routed(llama), PROBLEM.inputs(batches()[0])
    want = FeatureCache(moe, tmp_path, 2**20).features(batch)
    index = next(tmp_path.glob("*.jsonl"))
    lines = index.read_text().splitlines()
    lines[1] = edit(lines[1], lines[2])
    index.write_text("\n".join(lines) + "\n", encoding="latin-1")
    again = FeatureCache(moe, tmp_path, 2**20)
    assert torch.equal(again.features(batch), want) and again.misses >= 1


def test_it_keeps_no_more_than_it_may(llama, tmp_path):
    moe = routed(llama)
    for folder in (None, tmp_path):
        cache = FeatureCache(moe, folder, 4000)
        for batch in batches():
            cache.features(PROBLEM.inputs(batch))
        kept = sum(
            PROBLEM.batch([i])["input_ids"].shape[1] for t in words.stream() for i in t.train
        )
        assert len(cache) > 0 and cache._store.used <= 4000 < 4 * 32 * kept
    with pytest.raises(MoeRewriteError, match="max_bytes"):
        FeatureCache(moe, None, 0)


def test_padding_on_the_left_is_kept_whole(llama):
    moe = routed(llama)
    ids = torch.randint(3, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), moe.use_features(FeatureCache(moe).features(inputs)):
        got = moe(**inputs, use_cache=False).logits
    want = moe(**inputs, use_cache=False).logits
    torch.testing.assert_close(got[:, 4:], want[:, 4:], rtol=1e-4, atol=1e-5)


def test_features_of_another_configuration_or_precision_are_others(tmp_path):
    model = architectures.build("Llama", layers=2)
    moe, batch = routed(model), PROBLEM.inputs(batches()[0])
    want = FeatureCache(moe, tmp_path, 2**20).features(batch)
    other = architectures.build("Llama", layers=2)
    other.config.rms_norm_eps = 1e-2
    assert FeatureCache(routed(other), tmp_path, 2**20)._model != FeatureCache(moe)._model
    cache = FeatureCache(moe, tmp_path, 2**20)
    with torch.autocast("cpu", torch.bfloat16):
        cache.features(batch)
    assert cache.hits == 0
    assert torch.equal(cache.features(batch), want) and cache.hits == len(want)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("kind", ["jsonl", "bin"])
def test_something_else_in_place_of_a_file_is_named(llama, tmp_path, kind):
    moe = routed(llama)
    FeatureCache(moe, tmp_path, 2**20)
    file = tmp_path / f"features-{FeatureCache(moe)._model}.{kind}"
    for make in (os.mkfifo, os.mkdir):
        file.unlink(missing_ok=True)
        make(file)
        with pytest.raises(CheckpointError, match=f"{file.name}: is no plain file"):
            FeatureCache(moe, tmp_path, 2**20)
