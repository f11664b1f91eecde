"""Run one method over one stream, task by task; a run that was killed resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..utils.atomic_files import replace_file, write_json
from ..utils.folders import locked
from ..utils.read_files import read_bytes, read_json
from .identity import digest, identity_of
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
        kept = _RunFolder(out, identity)
        return _run(name, dense, problem, tasks, setup, base_task, score, kept)


def _run(
    name: str, dense: nn.Module, problem: Problem, tasks: Sequence[Task], setup: Setup,
    base_task: Task | None, score: str, kept: _RunFolder | None,
) -> Result:  # fmt: skip
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
        assert kept is not None
        method.restore(kept.tensors(learnt), tasks, learnt)
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


class _RunFolder:
    """The folder of a run: states by number of tasks learnt, and progress.json with the last."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.state_digest = ""

    def state(self, learnt: int) -> Path:
        return self.folder / f"after-{learnt}"

    def read(self) -> tuple[int, Result | None]:
        file = self.folder / PROGRESS
        if not file.exists():
            return 0, None
        progress = read_json(file)
        try:
            own = progress.pop("sha256")
            learnt, result = progress["learnt"], Result(**progress["result"])
            identity, self.state_digest = progress["identity"], progress["state"]
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: no progress of a run ({error}), or of an older version: use another --out"
            ) from None
        if own != digest(progress):
            raise CheckpointError(f"{file}: changed since it was written: use another --out")
        differs = sorted(
            k for k in identity | self.identity if identity.get(k) != self.identity.get(k)
        )
        if differs:
            raise ConfigError(
                f"{self.folder} holds another run, which differs in {', '.join(differs)}: use "
                "another --out, or the same options to go on"
            )
        return learnt, result

    def tensors(self, learnt: int) -> dict[str, torch.Tensor]:
        """The state after so many tasks. Raises CheckpointError."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self.state(learnt) / STATE
        content = read_bytes(file)
        if hashlib.sha256(content).hexdigest() != self.state_digest:
            raise CheckpointError(f"{file}: changed since it was written: use another --out")
        try:
            return load(content)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None

    def write(self, learnt: int, method: Method, result: Result) -> None:
        from safetensors.torch import save

        target = self.state(learnt)
        shutil.rmtree(target, ignore_errors=True)  # incomplete, from a killed run
        target.mkdir(parents=True)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in method.state().items()}
        content = save(tensors)
        replace_file(target / STATE, content)
        if isinstance(method, Learner):
            method.model.save_pretrained(target)
        facts = {"learnt": learnt, "result": result.to_dict(), "identity": self.identity}
        facts["state"] = hashlib.sha256(content).hexdigest()
        facts = json.loads(json.dumps(facts))  # as it will be read
        write_json(self.folder / PROGRESS, facts | {"sha256": digest(facts)})
        for old in self.folder.glob("after-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
