"""What a run is: its model, data, problem and options, by content. Only the same run is resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..converted.saving.checkpoint import fingerprint
from .digests import config_digest, digest
from .problem import Problem
from .registry import Setup
from .tasks import Task


def identity_of(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None, score: str,
) -> dict[str, Any]:  # fmt: skip
    """What must be equal for a run to be resumed, by what a user calls it. Can be written as JSON.

    Raises ConfigError for items and options whose content cannot be told.
    """
    options = asdict(setup)
    options.pop("cache")
    named = {f"task {i + 1} ({task.name})": task for i, task in enumerate(tasks)}
    identity = {
        "method": name,
        "model": {
            "kind": type(dense).__name__,
            "weights": digest(fingerprint(dense.state_dict())),
            "configuration": config_digest(getattr(dense, "config", None)),
        },
        "problem": problem.facts() | {"batches": digest(_first_batch(problem, tasks))},
        "options": options,
        "score": score,
        "number of tasks": len(tasks),
        **{f"data of {of}": _data(task) for of, task in named.items()},
        **{f"epochs of {of}": task.epochs for of, task in named.items()},
        **{f"classes of {of}": task.classes for of, task in named.items()},
        "data of the base task": None if base_task is None else _data(base_task),
    }
    return json.loads(json.dumps(identity, default=digest))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs between two identities, with the parts that differ in brackets."""
    names = []
    for name in one | other:
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            parts = differing(a, b)
            names += [f"{name} ({', '.join(parts)})"] if parts else []
        elif a != b:
            names.append(name)
    return names


def _data(task: Task) -> str:
    return digest([task.train, task.test, task.eval])


def _first_batch(problem: Problem, tasks: Sequence[Task]) -> Any:
    """A batch, which shows transforms that `Problem.facts` does not know of."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return problem.batch(tasks[0].train[:2])
