"""A small Llama that reads TRACE, its experts, and the prompts that are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import TokenRouter

from ..tools.data import data, model_folder
from ..tools.models import llama

# vLLM's attention on a CPU takes heads of 32 and more; those of stories260K have 8
LAYERS, WIDTH, HEADS, SPLIT = 4, 128, 4, 2
EXPERTS = {"code": "Py150", "german": "20Minuten", "sums": "NumGLUE-cm"}
TASKS = (*EXPERTS.values(), "ScienceQA", "MeetingBank")
LENGTH, BATCH = 64, 16  # tokens of a training text, texts of a step
CHARACTERS = (40, 80, 120, 160, 200)  # of prompts, by turns


def texts(task: str, part: str) -> list[str]:
    return [i["prompt"] for i in json.loads((data() / "TRACE" / task / f"{part}.json").read_text())]


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder("stories260K"))


def prompts(count: int) -> list[tuple[str, str]]:
    """(task, text) of TRACE's test items, none of which was trained on."""
    each = count // len(TASKS)
    lengths = len(CHARACTERS)
    return [
        (task, text[: CHARACTERS[i % lengths]])
        for task in TASKS
        for i, text in enumerate(texts(task, "test")[:each])
    ]


def rows(tokens: Any, tasks: Iterable[str]) -> torch.Tensor:
    """(N, LENGTH) of training texts, in a random order."""
    made = [tokens(t[: 8 * LENGTH])["input_ids"] for task in tasks for t in texts(task, "train")]
    whole = torch.tensor([r[:LENGTH] for r in made if len(r) >= LENGTH])
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]


def train(
    model: Any, parameters: Iterable[Any], ids: torch.Tensor, steps: int, rate: float
) -> float:
    """Some steps of next tokens; the last one's loss."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, rate)
    loss = torch.zeros(())
    for step in range(steps):
        start = step * BATCH % max(len(ids) - BATCH, 1)
        batch = ids[start : start + BATCH]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


def dense(tokens: Any, folder: Path, quick: bool) -> tuple[Any, float]:
    """(the Llama, its loss) after training on all tasks' texts; written to a folder."""
    model = llama(LAYERS, WIDTH, heads=HEADS, vocabulary=len(tokens))
    model.config.bos_token_id, model.config.eos_token_id = tokens.bos_token_id, tokens.eos_token_id
    model.generation_config.bos_token_id = tokens.bos_token_id
    model.generation_config.eos_token_id = tokens.eos_token_id
    steps = 20 if quick else 400
    loss = train(model, model.parameters(), rows(tokens, TASKS), steps, 3e-3)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model, loss


def progressive(model: Any, tokens: Any, quick: bool) -> Any:
    """An expert a task, one after the other, with `convert`'s own router."""
    moe: Any = moe_rewrite.convert(model, split=SPLIT)
    moe.remember()
    for number, (name, task) in enumerate(EXPERTS.items()):
        if number:
            moe.expand(1)
        moe.rename(number, name)
        moe.train()
        train(moe, moe.trainable_parameters(), rows(tokens, [task]), 4 if quick else 60, 3e-3)
    return moe


def by_token(model: Any, tokens: Any, quick: bool) -> Any:
    """Three experts, two of which every token gets, trained together with their router."""
    router = TokenRouter(top_k=2, init=0.5)
    moe: Any = moe_rewrite.convert(model, split=SPLIT, router=router, num_experts=len(EXPERTS))
    texts_of = rows(tokens, EXPERTS.values())
    train(moe, moe.trainable_parameters(), texts_of, 4 if quick else 120, 3e-3)
    return moe


def upcycled(model: Any, tokens: Any, quick: bool) -> Any:
    """Four experts a feed-forward in all layers, trained on all tasks' texts."""
    moe: Any = moe_rewrite.convert(model, split=0, mode="upcycle", num_experts=4)
    train(moe, moe.trainable_parameters(), rows(tokens, TASKS), 4 if quick else 60, 3e-3)
    return moe
