"""Run one method over one stream, task by task; a run that was killed resumes where it stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError
from ..utils.folders import locked
from .identity import identity_of
from .learner import Learner, router_use
from .methods.base import Method
from .problem import Problem
from .registry import Setup, make_method
from .results import Result
from .run_folder import RunFolder
from .tasks import Task


def run(
    name: str,
    dense: nn.Module,
    problem: Problem,
    tasks: Sequence[Task],
    setup: Setup,
    base_task: Task | None = None,
    score: str = "accuracy",
    out: Path | None = None,
) -> Result:
    """Learn the tasks in order, and score all of them before the first and after each.

    name: of the method, in `registry.METHODS`.
    dense: the model before the stream.
    base_task: what the model can do already, as a task that is scored too.
    score: ``"accuracy"``, ``"loss"`` or another of `problem.scores`.
    out: folder of this run: the state after the last task learnt (for PMoE, with a folder for
        `load`), and progress.json, which names it and is replaced last. A run with the same
        arguments resumes from it.

    Raises ConfigError for a wrong option, if `out` holds another run, is in use or cannot be
    written to; CheckpointError if its files are damaged or missing.
    """
    if score not in problem.scores:
        raise ConfigError(f"score={score!r}: expected one of {', '.join(problem.scores)}")
    if score == "loss" and any(task.classes for task in tasks):
        raise ConfigError(
            "score='loss': these tasks add classes, and the loss of a class that a head does not "
            "have yet is infinite; use 'accuracy'"
        )
    if out is None:
        return _run(name, dense, problem, tasks, setup, base_task, score, None)
    with locked(out):
        identity = identity_of(name, dense, problem, tasks, setup, base_task, score)
        kept = RunFolder(out, identity)
        return _run(name, dense, problem, tasks, setup, base_task, score, kept)


def _run(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None, score: str, kept: RunFolder | None,
) -> Result:  # fmt: skip
    learnt, result = (0, None) if kept is None else kept.read()
    if result is not None and learnt == len(tasks):
        return result
    _seed(setup, "start", 0)
    method = _method(name, dense, problem, tasks, setup, base_task, kept, learnt)
    if result is None:
        scores = _Scores(method, tasks, base_task)
        result = Result(
            [t.name for t in tasks], score, scores.of_tasks(score), [scores.of_base_task(score)],
            keeps_data=method.keeps_data,
        )  # fmt: skip
        if kept is not None:
            kept.begin(result)
    for number in range(learnt, len(tasks)):
        _seed(setup, tasks[number].name, number)
        start = time.perf_counter()
        method.learn(tasks, number)
        result.seconds += time.perf_counter() - start
        scores = _Scores(method, tasks, base_task)
        result.R.append(scores.of_tasks(score))
        result.base.append(scores.of_base_task(score))
        if number + 1 == len(tasks):
            result.other = scores.others(score)
        result.trainable, result.total = method.trainable(), method.total()
        if isinstance(method, Learner):
            everything = list(tasks) if base_task is None else [*tasks, base_task]
            result.router_use = router_use(method, everything)
            result.router_history.append(result.router_use)
        if kept is not None:
            kept.write(number + 1, method, result)
    return result


def learnt_method(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None = None, score: str = "accuracy", *, out: Path,
) -> Method:  # fmt: skip
    """The method as the run in `out` left it; arguments and errors as for `run`.

    Raises ConfigError if no task was learnt there.
    """
    kept = RunFolder(out, identity_of(name, dense, problem, tasks, setup, base_task, score))
    learnt, _ = kept.read()
    if not learnt:
        raise ConfigError(f"{out}: no task was learnt there; call run() with this folder first")
    return _method(name, dense, problem, tasks, setup, base_task, kept, learnt)


def _method(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None, kept: RunFolder | None, learnt: int,
) -> Method:  # fmt: skip
    """The method after so many tasks, from its folder; before the first, as it begins."""
    saved = kept.state(learnt) if kept is not None and learnt else None
    example = problem.inputs(problem.batch(tasks[0].train[:2]))
    method = make_method(name, dense, problem, setup, example, saved)
    method.begin(base_task)
    if kept is not None and saved is not None:
        method.restore(kept.tensors(learnt), tasks, learnt)
    return method


def _seed(setup: Setup, name: str, number: int) -> None:
    digest = hashlib.sha256(f"{setup.training.seed}/{name}/{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "big"))


class _Scores:
    """Scores of a method in its current state."""

    def __init__(self, method: Method, tasks: Sequence[Task], base_task: Task | None) -> None:
        self.method, self.tasks, self.base_task = method, tasks, base_task

    def of_tasks(self, kind: str) -> list[float]:
        return [self._score(i, task, kind) for i, task in enumerate(self.tasks)]

    def of_base_task(self, kind: str) -> float | None:
        if self.base_task is None:
            return None
        return self._score(None, self.base_task, "accuracy" if kind == "task" else kind)

    def others(self, kind: str) -> dict[str, list[float | None]]:
        """Other scores that need one forward pass an item: of the tasks, then the base task."""
        kinds = [k for k in ("accuracy", "loss") if k != kind]
        return {k: [*self.of_tasks(k), self.of_base_task(k)] for k in kinds}

    def _score(self, number: int | None, task: Task, kind: str) -> float:
        model = self.method.model_for(number)
        return self.method.problem.score(model, task, kind, self.method.device)
