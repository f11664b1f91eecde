"""Run one method over one stream, task by task; a run that was killed resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..utils.atomic_files import replace_file, write_json
from .learner import Learner, router_use
from .methods.base import Method
from .problem import Problem
from .registry import Setup, make_method
from .results import Result
from .tasks import Task

PROGRESS = "progress.json"
STATE = "state.safetensors"


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

    Raises ConfigError for a wrong option, or if `out` holds another run; CheckpointError if its
    files are damaged.
    """
    if score not in problem.scores:
        raise ConfigError(f"score={score!r}: expected one of {', '.join(problem.scores)}")
    if score == "loss" and any(task.classes for task in tasks):
        raise ConfigError(
            "score='loss': these tasks add classes, and the loss of a class that a head does not "
            "have yet is infinite; use 'accuracy'"
        )
    identity = _identity(name, tasks, setup, base_task, score)
    kept = None if out is None else _RunFolder(out, identity)
    learnt, result = (0, None) if kept is None else kept.read()
    if result is not None and learnt == len(tasks):
        return result
    _seed(setup, "start", 0)
    saved = kept.state(learnt) if kept is not None and learnt else None
    example = problem.inputs(problem.batch(tasks[0].train[:2]))
    method = make_method(name, dense, problem, setup, example, saved)
    method.begin(base_task)
    if result is None:
        scores = _Scores(method, tasks, base_task)
        result = Result(
            [t.name for t in tasks], score, scores.of_tasks(score), [scores.of_base_task(score)],
            keeps_data=method.keeps_data,
        )  # fmt: skip
    elif saved is not None:
        method.restore(_load(saved / STATE), tasks, learnt)
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
        if kept is not None:
            kept.write(number + 1, method, result)
    return result


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


def _identity(
    name: str, tasks: Sequence[Task], setup: Setup, base_task: Task | None, score: str
) -> dict[str, Any]:
    """What must be equal for a run to be resumed."""
    facts = json.loads(json.dumps(asdict(setup)))
    facts.pop("cache")
    sizes = [[t.name, len(t.train), len(t.test), t.epochs] for t in tasks]
    return {
        "method": name,
        "tasks": sizes,
        "setup": facts,
        "own": base_task is not None,
        "score": score,
    }


class _RunFolder:
    """The folder of a run: states by number of tasks learnt, and progress.json with the last."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def state(self, learnt: int) -> Path:
        return self.folder / f"after-{learnt}"

    def read(self) -> tuple[int, Result | None]:
        file = self.folder / PROGRESS
        if not file.exists():
            return 0, None
        try:
            progress = json.loads(file.read_text())
            learnt, result = progress["learnt"], Result(**progress["result"])
            identity = progress["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: no progress of a run ({error})") from None
        differs = [k for k in self.identity if identity.get(k) != self.identity[k]]
        if differs:
            raise ConfigError(
                f"{self.folder} holds another run, which differs in {', '.join(differs)}: use "
                "another --out, or the same options to go on"
            )
        return learnt, result

    def write(self, learnt: int, method: Method, result: Result) -> None:
        from safetensors.torch import save

        target = self.state(learnt)
        shutil.rmtree(target, ignore_errors=True)  # incomplete, from a killed run
        target.mkdir(parents=True)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in method.state().items()}
        replace_file(target / STATE, save(tensors))
        if isinstance(method, Learner):
            method.model.save_pretrained(target)
        progress = {"learnt": learnt, "result": result.to_dict(), "identity": self.identity}
        write_json(self.folder / PROGRESS, progress)
        for old in self.folder.glob("after-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
