"""What a run is: its model, data, problem and options, by content. Only the same run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..converted.checkpoint import fingerprint
from ..errors import ConfigError
from ..utils.content_key import content_key
from ..utils.tensor_bytes import tensor_bytes
from .problem import Problem
from .registry import Setup
from .tasks import Task


def identity_of(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None, score: str,
) -> dict[str, Any]:  # fmt: skip
    """What must be equal for a run to be resumed, by what a user calls it. Can be written as JSON.

    Raises ConfigError for items whose content cannot be told.
    """
    options = asdict(setup)
    options.pop("cache")
    return {
        "method": name,
        "model": digest([type(dense).__name__, fingerprint(dense.state_dict())]),
        "problem": digest(problem.facts()),
        "options": json.loads(json.dumps(options)),
        "score": score,
        "number of tasks": len(tasks),
        **{f"data of task {i + 1} ({task.name})": _of(task) for i, task in enumerate(tasks)},
        "data of the base task": None if base_task is None else _of(base_task),
    }


def digest(content: Any) -> str:
    """Of nested lists, dicts, numbers, strings, arrays and tensors, by type and content."""
    return hashlib.sha256(repr(content_key(content, _other)).encode()).hexdigest()[:32]


def _of(task: Task) -> str:
    return digest([task.name, task.train, task.test, task.eval, task.epochs, task.classes])


def _other(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(tensor_bytes(value)).hexdigest()
        return "tensor", str(value.dtype), tuple(value.shape), content
    raise ConfigError(
        f"an item holds a {type(value).__name__}, whose content cannot be told from another's: use "
        "numbers, strings, arrays and tensors, or run without a folder"
    )
