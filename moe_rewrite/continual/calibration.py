"""Calibration batches of tasks, from which ``split="auto"`` chooses the cut."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ConfigError
from .problem import Batch, Problem
from .tasks import Task


def calibration_of(
    problem: Problem, tasks: Iterable[Task], samples: int = 32
) -> dict[str, list[Batch]]:
    """The first training items of each task, as `convert` takes its `calibration`.

    problem: makes batches of items.
    tasks: those that are known at conversion; what the model can do already, the base task, may be
        one of them.
    samples: items of each at most.

    Raises ConfigError for two tasks of one name.
    """
    found: dict[str, list[Batch]] = {}
    size = problem.scoring_batch
    for task in tasks:
        if task.name in found:
            raise ConfigError(f"two tasks are named {task.name!r}: rename one")
        items = task.train[:samples]
        made = (problem.batch(items[i : i + size]) for i in range(0, len(items), size))
        found[task.name] = [problem.inputs(batch) for batch in made]
    return found
