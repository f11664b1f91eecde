"""The token gate in closed form: ridge regression on sums, whatever the order of tasks."""

import dataclasses
import json

import architectures
import numpy as np
import pytest
import torch
from conversions import fresh
from reference import added, randomize

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter

PREFIX = TokenRouter(fit="analytic", granularity="prefix", projection=64)


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama", layers=2)


def batches(low, high, seed, count=3):
    """Sequences over a range of tokens: tasks that differ in what they speak of."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (4, 9), generator=generator) for _ in range(count)]


TASKS = {None: batches(3, 30, 1), 0: batches(30, 60, 2), 1: batches(60, 90, 3)}


def routed(llama, spec=PREFIX):
    return fresh(llama, split=1, router=spec, num_experts=2, verify=False)


def fitted(llama, order=(None, 0, 1), spec=PREFIX):
    moe = routed(llama, spec)
    for expert in order:
        moe.fit_router(expert, [{"input_ids": b} for b in TASKS[expert]])
    return moe


def features(llama, ids, lift):
    """What the prefix gate reads, by hand: running means of random features of every position."""
    seen = {}
    handle = llama.model.layers[0].register_forward_hook(lambda m, a, out: seen.update(x=out))
    with torch.no_grad():
        llama(input_ids=ids, use_cache=False)
    handle.remove()
    x = seen["x"][0] if isinstance(seen["x"], tuple) else seen["x"]
    x = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ lift).relu()
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)


def test_rows_solve_the_ridge_regression(llama):
    moe = fitted(llama)
    grams, means = [], []
    for ids in TASKS.values():
        x = torch.cat([features(llama, b, moe.router.lift).flatten(0, 1) for b in ids])
        f = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], 1)
        grams.append(f.T @ f / len(f))
        means.append(f.mean(0))
    gram = sum(grams)
    gram += 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    want = np.linalg.solve(gram, np.stack(means, 1)).T
    got = torch.stack([moe.router.frozen, *moe.router.rows]).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3)


def test_the_gate_knows_the_tasks_that_it_never_trained_on(llama):
    spec = TokenRouter(fit="analytic", granularity="prefix", projection=256)
    moe = routed(llama, spec)
    spans = {None: (3, 30), 0: (30, 60), 1: (60, 90)}
    for expert, (low, high) in spans.items():
        moe.fit_router(expert, [(b,) for b in batches(low, high, low, 40)])
    for index, (low, high) in enumerate(spans.values()):
        plan = moe.route(input_ids=torch.cat(batches(low, high, 77, 5)))
        assert (plan.selected[:, 4:] == index).float().mean() > 0.9
        assert plan.gates.sum(-1).allclose(torch.ones(20, 9))


def test_the_order_of_tasks_does_not_matter(llama):
    one, other = fitted(llama), fitted(llama, (1, None, 0))
    for a, b in zip(one.router.moments, other.router.moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(one.router.rows, other.router.rows, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # nor does what a task is cut into
    moe = routed(llama)
    for expert, ids in TASKS.items():
        for batch in ids:
            moe.fit_router(expert, [(batch[:2],), (batch[2:],)])
    torch.testing.assert_close(moe.router.rows[1], one.router.rows[1], rtol=0, atol=1e-5)


def test_a_prefix_is_read_the_same_step_by_step(llama):
    """Decoding with a cache: the running mean and its prior go on where they stopped."""
    moe = fitted(llama)
    randomize(moe)
    ids = torch.cat(TASKS[0])
    with torch.no_grad():
        whole = moe(input_ids=ids)
        first = moe(input_ids=ids[:, :4])
        rest = [moe(input_ids=ids[:, 4:5], past_key_values=first.past_key_values)]
        rest.append(moe(input_ids=ids[:, 5:], past_key_values=rest[0].past_key_values))
    got = torch.cat([first.logits, *(r.logits for r in rest)], 1)
    torch.testing.assert_close(got, whole.logits, rtol=1e-4, atol=1e-4)


def test_a_short_prefix_is_the_frozen_models(llama):
    moe = fitted(llama, spec=dataclasses.replace(PREFIX, prior=0.0))
    careful = fitted(llama, spec=dataclasses.replace(PREFIX, prior=3.0))
    ids = torch.cat(TASKS[1])
    free, held = moe.route(input_ids=ids).gates, careful.route(input_ids=ids).gates
    seen = torch.arange(1, ids.shape[1] + 1).view(1, -1)
    odds = (held[..., 0] / held[..., 1]).log() - (free[..., 0] / free[..., 1]).log()
    torch.testing.assert_close(odds, (12.0 * 3.0 / seen).expand_as(odds), rtol=1e-3, atol=1e-3)


def test_padding_does_not_count(llama):
    moe = routed(llama)
    for expert, ids in TASKS.items():
        for batch in ids:
            padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), batch], 1)
            mask = torch.ones_like(padded)
            mask[:, :3] = 0
            moe.fit_router(expert, [{"input_ids": padded, "attention_mask": mask}])
    counts = [int(m[-1, -1]) for m in moe.router.moments]
    assert counts == [3 * 4 * 9] * 3


def test_a_stream_goes_on_after_saving_and_goes_back(llama, tmp_path):
    moe = fitted(llama)
    before = {k: v.clone() for k, v in added(moe).items()}
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, llama, verify=False)
    more = [{"input_ids": b} for b in batches(90, 97, 5)]
    plans = []
    for model in (moe, again):
        assert model.expand(1, name="later")  # experts' matrices; no row to train
        model.fit_router("later", more)
        model.activate("later")
        plans.append(model.route(input_ids=TASKS[0][0]).gates)
    assert torch.equal(*plans)
    moe.remove_last()
    now = added(moe)
    assert now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def test_nothing_of_the_router_is_trained(llama):
    moe = fitted(llama)
    randomize(moe)
    moe.train()
    moe(input_ids=TASKS[0][0], labels=TASKS[0][0]).loss.backward()
    assert all(row.grad is None for row in moe.router.rows)
    names = [n for n, p in moe.named_parameters() if p.requires_grad]
    assert names and not [n for n in names if n.startswith("router")]


def test_a_trained_router_cannot_be_solved(llama):
    moe = moe_rewrite.convert(llama, split=1, router="token", verify=False)
    with pytest.raises(MoeRewriteError, match="fit='analytic'"):
        moe.fit_router(0, [TASKS[0][0]])
    for wrong in (
        {"fit": "closed"},
        {"projection": 0},
        {"ridge": 0},
        {"prior": -1},
        {"sharpness": "high"},
    ):
        with pytest.raises(MoeRewriteError, match=next(iter(wrong))):
            TokenRouter(**wrong)


def test_real_tasks_are_distinguished_without_training(stories, data):
    """Three TRACE tasks and the model's own stories, with the pretrained Llama, on test texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"

    def texts(task, part, count):
        records = json.loads((data / "data" / "TRACE" / task / f"{part}.json").read_text())
        return [r["prompt"] for r in records[:count]]

    def tokens(lines):
        made = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=96)
        return {k: made[k] for k in ("input_ids", "attention_mask")}

    torch.manual_seed(0)
    start = torch.full((48, 1), tokenizer.bos_token_id or 1)
    sampled = stories.generate(start, max_new_tokens=64, do_sample=True, pad_token_id=0)
    router = TokenRouter(fit="analytic", granularity="prefix")
    moe = moe_rewrite.convert(stories, split=3, router=router, num_experts=3)
    moe.fit_router(None, [{"input_ids": sampled[:32]}])
    names = ("FOMC", "ScienceQA", "Py150")
    for expert, task in enumerate(names):
        moe.fit_router(expert, [tokens(texts(task, "train", 64))])
    right = [last(moe, {"input_ids": sampled[32:]}) == 0]
    right += [last(moe, tokens(texts(t, "test", 40))) == e + 1 for e, t in enumerate(names)]
    assert [r.float().mean() > 0.9 for r in right] == [True] * 4, [r.float().mean() for r in right]


def last(moe, inputs):
    """The most weighted output at the last position."""
    return moe.route(**inputs).selected[:, -1]
