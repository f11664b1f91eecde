"""A tiny Llama and random texts, so that the examples run anywhere; put your own in their place."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 64


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=WORDS)).eval()


def texts(count=16):
    ids = torch.randint(1, WORDS, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def batches(texts, size=4):
    for start in range(0, len(texts), size):
        yield torch.stack([text["input_ids"] for text in texts[start : start + size]])


def train(model, texts):
    """Any loop; returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for rows in batches(texts):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(WORDS - 1)} | {"[UNK]": WORDS - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "w0", "eos_token": "w1"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
