"""The share of experts over the time of a run, read from the folder of `learn` or `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..utils.read_files import shown
from .run_folder import PROGRESS, read_result


@dataclass(frozen=True)
class ExpertShares:
    """Mean gates of one method's router in a run.

    method: name of the folder, which is the method's.
    tasks: names, in the order in which they were learnt.
    base: the base task was scored too; its shares come last in `shares[i]`.
    first: how many tasks were learnt when the first of `shares` was taken: 1, or more in a folder that
        an older version began.
    shares: [i][j]: after learning task first - 1 + i, the mean gates on task j's test items: the frozen
        model's, then each expert's. Experts that come later have none.
    experts: folder of the experts after the last task learnt, for `moe_rewrite.load`.
    """

    method: str
    tasks: tuple[str, ...]
    base: bool
    first: int
    shares: list[list[list[float]]]
    experts: Path

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """For `Report.html(run=...)`. names: of the model's experts, in order."""
        size = len(self.shares[-1][0])
        known = [*names, *(f"expert {i}" for i in range(len(names), size - 1))]
        rows = [*self.tasks, "the base task"][: len(self.shares[-1])]
        return {
            "method": self.method,
            "tasks": list(self.tasks[self.first - 1 :][: len(self.shares)]),
            "outputs": ["frozen model", *known[: size - 1]],
            "over_time": self.over_time(),
            "by_task": [
                {"task": task, "shares": use}
                for task, use in zip(rows, self.shares[-1], strict=True)
            ],
        }

    def over_time(self) -> list[list[float]]:
        """[i][e]: output e's mean gate over the tasks learnt so far, at `shares[i]`; 0 for
        experts that come later."""
        size = len(self.shares[-1][0])
        means = []
        for learnt, uses in enumerate(self.shares, start=self.first):
            columns = zip(*uses[:learnt], strict=True)
            mean = [sum(column) / learnt for column in columns]
            means.append(mean + [0.0] * (size - len(mean)))
        return means


def expert_shares(folder: Path) -> ExpertShares:
    """Of a method's folder, or of a folder with one such method.

    Raises ConfigError for a folder that holds no run with a router or several, CheckpointError for
    files that are damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one of `moe-rewrite learn --out`")
    runs = (
        [folder]
        if (folder / PROGRESS).exists()
        else sorted(p.parent for p in folder.glob(f"*/{PROGRESS}"))
    )
    found = {run.name: shares for run in runs if (shares := _shares(run)) is not None}
    if len(found) != 1:
        have = f"the runs {', '.join(found)}: name one of these folders" if found else "none"
        raise ConfigError(
            f"{folder}: expected one run that learnt a task with a router; it has {have}"
        )
    return next(iter(found.values()))


def _shares(folder: Path) -> ExpertShares | None:
    """None for a method without a router, and before the first task."""
    learnt, result = read_result(folder)
    history = result.router_history or ([result.router_use] if result.router_use else [])
    if not history:
        return None
    columns = len(result.tasks)
    for uses in history:
        if not all(
            len(uses) in (columns, columns + 1) and len(use) == len(uses[0]) for use in uses
        ):
            raise CheckpointError(
                f"{folder / PROGRESS}: router_history={shown(uses)}: expected one list a task"
            )
    base = len(history[-1]) > columns
    name, first = folder.resolve().name, learnt - len(history) + 1
    experts = folder / f"after-{learnt}"
    return ExpertShares(name, tuple(result.tasks), base, first, history, experts)
