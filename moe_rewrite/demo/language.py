"""A causal language model learns tasks in TRACE's format; first of all, what it says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert import convert
from ..converted.model import MoEModel
from ..errors import ConfigError
from .comparison import Part, Step, compare

LENGTH = 192  # tokens of a language item
OWN_LENGTH = 64  # of what the model says of itself


def language(
    folder: str,
    dense: nn.Module,
    tasks: dict[str, dict[str, list[dict[str, str]]]],
    out: Path,
    split: int | float | str,
    epochs: int,
    max_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The same on a causal language model; the score is the accuracy of the answer's tokens."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    missing = sorted(set(tasks["train"]) ^ set(tasks["test"]))
    if missing:
        raise ConfigError(f"tasks {missing} lack train.json or test.json")
    parts = [
        (_encode(tokenizer, tasks["train"][n][:max_samples]),
         _encode(tokenizer, tasks["test"][n][:max_samples]))
        for n in tasks["train"]
    ]  # fmt: skip
    own = _own_text(dense, max_samples)
    moe = convert(dense, split=split)
    assert isinstance(moe, MoEModel)

    def loss(model: nn.Module) -> Step:
        return lambda x, y, task: model(input_ids=x, labels=y, use_cache=False).loss

    def accuracy(model: nn.Module, part: Part) -> float:
        right = counted = 0
        for x, y in zip(part.x.split(8), part.y.split(8), strict=True):
            guess = model(input_ids=x, use_cache=False).logits[:, :-1].argmax(-1)
            keep = y[:, 1:] != -100
            right += int((guess == y[:, 1:])[keep].sum())
            counted += int(keep.sum())
        return right / max(counted, 1)

    names = ["its own text", *tasks["train"]]
    return compare(
        "language", dense, moe, names, [own, *parts], loss, accuracy, out, epochs,
        lr=1e-3, batch=8,
    )  # fmt: skip


@torch.no_grad()
def _own_text(model: Any, count: int, test: int = 32) -> tuple[Part, Part]:
    """(train, test) of what the model says of itself, greedily after one random token: the first
    task, which shows what is lost of it."""
    start = torch.randint(3, model.config.vocab_size, (count + test, 1))
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, pad_token_id=0,
        min_new_tokens=OWN_LENGTH - 1, max_new_tokens=OWN_LENGTH - 1,
    )  # fmt: skip
    x = torch.zeros(len(ids), LENGTH, dtype=torch.long)
    y = torch.full_like(x, -100)
    x[:, :OWN_LENGTH], y[:, 1:OWN_LENGTH] = ids, ids[:, 1:]
    return Part(x[:count], y[:count]), Part(x[count:], y[count:])


def _encode(tokenizer: Any, records: list[dict[str, str]]) -> Part:
    """Prompt and answer as ids (items, LENGTH), cut in the prompt; labels on the answer only."""
    ids = torch.zeros(len(records), LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, record in enumerate(records):
        answer = tokenizer(record["answer"], add_special_tokens=False)["input_ids"][: LENGTH // 2]
        prompt = tokenizer(record["prompt"])["input_ids"][-(LENGTH - len(answer)) :]
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return Part(ids, labels)
