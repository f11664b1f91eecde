"""Greedy tokens of an engine, those of the converted model, and how the two compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..tools.report import finish, save

NEW = 16  # tokens of an answer

Answer = dict[str, Any]  # prompt: the engine's ids of the text; tokens; choice, by a proxy


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int]) -> list[int]:
    """NEW tokens; the end of a text is not among them, as the engines are asked."""
    given = torch.tensor([ids])
    made = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
        max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(ids) :].tolist()


@torch.no_grad()
def gap(model: Any, ids: Sequence[int], wanted: list[int], given: list[int]) -> float:
    """By how much the model's logit of its own token is above that of the engine's, where the two
    first differ: about 1e-5 is rounding."""
    same = next(i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b)
    logits = model(input_ids=torch.tensor([[*ids, *wanted[:same]]])).logits[0, -1]
    return float(logits[wanted[same]] - logits[given[same]])


@cache
def dense_answer(model: Any, ids: tuple[int, ...]) -> list[int]:
    """`greedy` of the dense model, which every case asks for the same prompts."""
    return greedy(model, ids)


def compared(task: str, ids: list[int], answer: Answer, model: Any, other: Any) -> dict[str, Any]:
    """A prompt's row. ids: as our tokenizer reads it. other: the dense model."""
    wanted = greedy(model, ids)
    row = {
        "task": task, "choice": answer.get("choice", ""), "read": answer["prompt"] == ids,
        "same": answer["tokens"] == wanted, "dense": answer["tokens"] == dense_answer(other, tuple(ids)),
    }  # fmt: skip
    if not row["same"]:
        row["gap"] = gap(model, ids, wanted, answer["tokens"])
    return row


COUNTED = {
    "read": "same ids of the text", "same": "same tokens", "router": "the router's choice",
    "own": "tokens with every position gated", "dense": "the dense model's tokens",
}  # fmt: skip


def by_task(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of prompts for each task and for all, and the gaps of those that differ."""
    made = {}
    for task in [*dict.fromkeys(r["task"] for r in rows), "all"]:
        of = [r for r in rows if task in (r["task"], "all")]
        counts = {k: sum(r[k] for r in of) for k in COUNTED if k in of[0]}
        chosen = dict(Counter(r["choice"] for r in of if r["choice"]))
        gaps = sorted(r["gap"] for r in of if "gap" in r)
        made[task] = {"prompts": len(of), **counts, "chosen": chosen, "gaps": gaps}
    return made


def report(name: str, cases: dict[str, list[dict[str, Any]]], quick: bool, **facts: Any) -> None:
    """Print the table and the line of JSON; a full run is saved."""
    figures = {case: by_task(rows) for case, rows in cases.items()}
    table = [
        [case, task, of["prompts"], *(of.get(k, "") for k in COUNTED), _chosen(of), _largest(of)]
        for case, tasks in figures.items()
        for task, of in tasks.items()
    ]
    columns = ["case", "prompts of", "number", *COUNTED.values(), "chosen", "largest gap"]
    figures = facts | {"new_tokens": NEW, "cases": figures}
    finish(name, columns, table, **figures)
    if not quick:
        save(name, figures)


def _chosen(of: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in of["chosen"].items())


def _largest(of: dict[str, Any]) -> str:
    return f"{of['gaps'][-1]:.1e}" if of["gaps"] else ""
