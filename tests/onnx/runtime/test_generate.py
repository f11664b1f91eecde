"""Greedy text from ONNX Runtime: the same tokens as PyTorch's, from one graph for all steps."""

import architectures
import pytest
import torch
from reference import randomize

import moe_rewrite
from moe_rewrite import FFNExperts, TokenRouter
from moe_rewrite.errors import ConfigError

pytest.importorskip("onnx")


def greedy(moe, ids, new, **given):
    return moe.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **given)  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("experts", [None, FFNExperts()], ids=["lora", "ffn"])
def test_real_llama_writes_the_same_200_tokens(stories, experts, tmp_path):
    router = TokenRouter(granularity="prefix", top_k=2)
    moe = moe_rewrite.convert(stories, split=2, router=router, num_experts=3, experts=experts)
    randomize(moe, size=0.1)
    path = tmp_path / "stories.onnx"
    moe_rewrite.export_onnx(moe, path, cache=True)
    generator = moe_rewrite.onnx.generator(path)
    ids = torch.tensor([[1, 403, 407, 261]])
    want = greedy(moe, ids, 200)
    assert torch.equal(generator.generate(ids, 200), want) and want.shape == (1, 204)
    assert not torch.equal(want, greedy(stories, ids, 200))  # the experts matter
    first = moe_rewrite.onnx.load(path)
    with pytest.raises(Exception, match="past_key_values"):
        first(input_ids=ids)


@pytest.mark.sweep
def test_small_llama_writes_the_same_200_tokens_of_a_padded_batch(tmp_path):
    model = architectures.build("Llama")
    model.config.max_position_embeddings = 256
    moe = moe_rewrite.convert(model, split=1, num_experts=2, router="token")
    randomize(moe)
    path = tmp_path / "llama.onnx"
    moe_rewrite.export_onnx(moe, path, cache=True)
    generator = moe_rewrite.onnx.generator(path)
    ids = torch.tensor([[0, 0, 5, 9, 11], [7, 3, 2, 8, 40]])
    mask = (ids != 0).long()
    want = greedy(moe, ids, 200, attention_mask=mask)
    assert torch.equal(generator.generate(ids, 200, attention_mask=mask), want)
    stopped = generator.generate(ids[1:], 200, eos_token_id=int(want[1, 30]))
    assert torch.equal(stopped, want[1:, : stopped.shape[1]]) and stopped.shape[1] <= 31
    with pytest.raises(ConfigError, match="cache=True"):
        moe_rewrite.export_onnx(moe, path, verify=False)
        moe_rewrite.onnx.generator(path)
