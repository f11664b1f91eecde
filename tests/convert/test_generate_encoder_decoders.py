"""generate() of encoder-decoders that were converted in the decoder."""

import architectures
import pytest
import torch
from conversions import fresh
from reference import randomize

import moe_rewrite
from moe_rewrite.errors import InputError

SPLITS = {"T5": "decoder.block.1", "Bart": "model.decoder.layers.1"}
HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "num_beams": 2, "no_repeat_ngram_size": 2},
}
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}


def model_of(name):
    return architectures.build(name) if name in architectures.ALL else architectures.build_other(name)  # fmt: skip


def prompts(batch, length, seed=0):
    """Ids, and a mask that leaves the last of the first sample out."""
    ids = torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=SPLITS)
def converted(request):
    model = model_of(request.param)
    return model, fresh(model, split=SPLITS[request.param], num_experts=2)


@pytest.mark.parametrize("how", HOW)
def test_fresh_experts_generate_what_the_dense_model_does(converted, how):
    model, moe = converted
    for given in (prompts(2, 7), prompts(1, 11, 1), prompts(3, 4, 2)):
        want = model.generate(**given, **LENGTH, **HOW[how])
        assert torch.equal(moe.generate(**given, **LENGTH, **HOW[how]), want)


def by_hand(moe, given, tokens):
    """Each token from a call on the whole: encoder and decoder, without generate()."""
    start = moe.host.config.decoder_start_token_id
    ids = torch.full((len(given["input_ids"]), 1), start)
    for step in range(tokens):
        logits = moe(**given, decoder_input_ids=ids).logits[:, -1]
        ends = torch.tensor(moe.host.config.eos_token_id).reshape(-1)
        forced = getattr(moe.host.module.generation_config, "forced_bos_token_id", None)
        logits[:, ends] = float("-inf")  # as min_new_tokens does
        if forced is not None and step == 0:
            logits = torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor([forced]), 0)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_trained_experts_generate_what_calls_on_the_whole_give(converted, tmp_path):
    model, moe = converted
    plain = {n: p.clone() for n, p in moe.state_dict().items()}
    randomize(moe, size=0.5)
    greedy = {**LENGTH, **HOW["greedy"], "forced_eos_token_id": None}
    try:
        given = prompts(2, 9, 3)
        with torch.no_grad():
            want = by_hand(moe, given, 6)
        got = moe.generate(**given, **greedy)
        assert torch.equal(got, want)
        assert not torch.equal(got, model.generate(**given, **greedy))
        moe.save_pretrained(tmp_path)
        again = moe_rewrite.load(tmp_path, model)
        assert torch.equal(again.generate(**given, **greedy), got)
    finally:
        moe.load_state_dict(plain)


def test_a_cache_is_refused(converted):
    with pytest.raises(InputError, match=r"generate\(use_cache=True\): .*leave use_cache out"):
        converted[1].generate(**prompts(2, 5), use_cache=True)
