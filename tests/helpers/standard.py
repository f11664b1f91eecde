"""Tiny dense language models of every base, upcycled and trained for a few steps."""

from functools import cache

import torch
import transformers as hf

import moe_rewrite
from moe_rewrite import FFNExperts

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
BASES = {
    "Llama": ("Llama", {}), "SmolLM": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": 7, "head_dim": 16}), "Qwen2": ("Qwen2", {}),
    "Qwen2.5": ("Qwen2", {"tie_word_embeddings": True} | WINDOW),
    "Qwen3": ("Qwen3", {"head_dim": 16}), "GLM": ("Glm", {"head_dim": 16}),
    "LlamaBias": ("Llama", {"attention_bias": True}), "LlamaGelu": ("Llama", {"hidden_act": "gelu"}),
    "Llama3Rope": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }}),
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def dense(base, **more):
    kind, options = BASES[base]
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**(SIZES | options | more))
    return getattr(hf, f"{kind}ForCausalLM")(config).eval()


@cache
def trained(base, split=1, score="softmax", **more):
    """An upcycled model after a few steps; not to be changed."""
    experts = FFNExperts(num=3, score=score)
    moe = moe_rewrite.convert(dense(base, **more), mode="upcycle", split=split, experts=experts)
    train(moe)
    return moe


def train(moe):
    moe.train()
    optimizer = torch.optim.Adam(moe.trainable_parameters(), 0.01)
    for _ in range(3):
        out, plan = moe.with_plan(input_ids=IDS, labels=IDS)
        (out.loss + 0.01 * plan.load_balance_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moe.eval()


def logits(model, length):
    with torch.no_grad():
        return model(input_ids=IDS[:, :length]).logits
