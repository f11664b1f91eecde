"""Attention with fewer heads of keys and values than of queries copies none of them on the CPU."""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_rewrite
from moe_rewrite.passes.attend import attend
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some


class Largest(TorchDispatchMode):
    """The most numbers that an operation copies."""

    def __init__(self):
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.copied = max(self.copied, out.numel())
        return out


@functools.cache
def grouped(name):
    """Dense and converted, two heads of queries for each of keys."""
    dense = architectures.build(name)
    return dense, moe_rewrite.convert(dense, split=1)


def rows(length, padded):
    ids = torch.randint(3, 97, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", some(["Llama", "Qwen3", "Mistral", "Gemma3"], {"Llama", "Gemma3"}))
@pytest.mark.parametrize(("length", "padded"), [(9, 0), (5, 2), (14, 6)])
def test_what_is_computed_is_what_the_dense_model_computes(name, length, padded):
    dense, moe = grouped(name)
    given = rows(length, padded)
    counted = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            moe(**given).logits[counted], dense(**given).logits[counted], rtol=0, atol=1e-5
        )
        made = moe.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
        wanted = dense.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(made, wanted)


def test_a_cache_is_not_copied_head_by_head():
    moe = copy.deepcopy(grouped("Llama")[1])
    randomize(moe, size=0.5)
    given = rows(64, 0)
    with torch.no_grad():
        cache = moe(**given, use_cache=True).past_key_values
        step = {"input_ids": given["input_ids"][:, :1], "past_key_values": cache}
        step["attention_mask"] = torch.ones(2, 65, dtype=torch.long)
        moe(**step)  # captures
        step["attention_mask"] = torch.ones(2, 66, dtype=torch.long)
        with Largest() as seen:
            moe(**step)
    assert seen.copied < cache.layers[0].keys.numel()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("groups", "repeats", "causal"), [(1, 4, True), (2, 2, False), (3, 1, True)]
)
def test_heads_are_shared_in_their_order(groups, repeats, causal, grad):
    torch.manual_seed(0)
    query = torch.randn(2, groups * repeats, 5, 8)
    key, value = torch.randn(2, 2, groups, 5, 8)
    mask = None if causal else torch.rand(2, 1, 5, 5) > 0.2
    with torch.set_grad_enabled(grad):
        made = attend(query, key, value, repeats, mask, 0.0, causal, 0.3)
    scores = torch.einsum("bhsd,bhtd->bhst", query, key.repeat_interleave(repeats, 1)) * 0.3
    seen = torch.ones(5, 5).tril().bool() if causal else mask
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    wanted = weights @ value.repeat_interleave(repeats, 1)
    counted = seen.any(-1).expand(2, groups * repeats, 5)
    torch.testing.assert_close(made[counted], wanted[counted])
