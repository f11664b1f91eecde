"""Metrics of continual learning: OP, average, backward and forward transfer, forgetting.

R[i][j] is the score on task j after learning task i, higher is better. T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from ..errors import ConfigError


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores on every task after each task.

    tasks: their names, in the order in which they were learnt.
    scores: R, a row for each task learnt so far.
    before: scores of all tasks before the first was learnt, or None.

    Raises ConfigError unless every row has one score for each task.
    """

    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    before: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "scores", tuple(tuple(row) for row in self.scores))
        rows = [*self.scores, *([] if self.before is None else [self.before])]
        if not 1 <= len(self.scores) <= len(self.tasks):
            raise ConfigError(
                f"{len(self.scores)} rows of scores: expected 1 to {len(self.tasks)}, one a task"
            )
        wrong = [len(row) for row in rows if len(row) != len(self.tasks)]
        if wrong:
            raise ConfigError(f"a row of {wrong[0]} scores: expected {len(self.tasks)}, one a task")

    @property
    def learnt(self) -> int:
        return len(self.scores)

    def overall(self, task: int | None = None) -> float:
        """OP_t: mean score over tasks 0..t after learning task t (TRACE, arXiv 2310.06762,
        section 3.4). By default t is the last task learnt; that figure is also called Last."""
        at = self.learnt - 1 if task is None else task
        return mean(self.scores[at][: at + 1])

    @property
    def average(self) -> float:
        """Avg: mean of OP_t over the tasks learnt."""
        return mean(self.overall(t) for t in range(self.learnt))

    @property
    def backward_transfer(self) -> float:
        """BWT: mean over older tasks of R[T-1][j] - R[j][j] (Lopez-Paz & Ranzato 2017, equation 3);
        0 for a single task."""
        last = self.scores[-1]
        return _mean([last[j] - self.scores[j][j] for j in range(self.learnt - 1)])

    @property
    def forward_transfer(self) -> float | None:
        """FWT: mean over later tasks of R[j-1][j] - before[j] (Lopez-Paz & Ranzato 2017, equation
        4); None without `before`."""
        if self.before is None:
            return None
        gains = [self.scores[j - 1][j] - self.before[j] for j in range(1, self.learnt)]
        return _mean(gains)

    @property
    def forgetting(self) -> float:
        """Mean over older tasks of the drop from their best score since they were learnt to their
        last score (Chaudhry et al. 2018, arXiv 1801.10112, equation 3, from task j on)."""
        last = self.scores[-1]
        drops = [max(row[j] for row in self.scores[j:]) - last[j] for j in range(self.learnt - 1)]
        return _mean(drops)


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else 0.0
