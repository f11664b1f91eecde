"""The interface of problems: how items become batches, what is predicted, and how it is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from .tasks import Item, Task

Batch = dict[str, torch.Tensor]
Model = Callable[..., Any]


class Problem(ABC):
    """Inputs, targets and scores of one kind of task. N: predicted rows, C: classes.

    scores: names that `score` knows.
    batch_size, scoring_batch: items of a batch in training and in scoring.
    """

    scores: tuple[str, ...] = ("accuracy", "loss")
    batch_size: int = 8
    scoring_batch: int = 32

    @abstractmethod
    def batch(self, items: Sequence[Item]) -> Batch:
        """These items as tensors: the model's arguments, and ``labels``."""

    def facts(self) -> dict[str, Any]:
        """What the batches made of given items depend on, for `identity_of`."""
        simple = (bool, int, float, str, type(None))
        own = {k: v for k, v in vars(self).items() if isinstance(v, simple)}
        return {"kind": type(self).__name__, **own}

    @abstractmethod
    def predict(self, model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C) logits of the rows that count, and their (N,) int64 targets."""

    def inputs(self, batch: Batch) -> Batch:
        """The model's arguments of a batch."""
        return {k: v for k, v in batch.items() if k != "labels"}

    def loss(self, model: Model, batch: Batch) -> torch.Tensor:
        """Mean cross entropy over the rows that count. Raises ConfigError as `cross_entropy` does."""
        return cross_entropy(*self.predict(model, batch))

    def batches(self, items: Sequence[Item], device: torch.device) -> Iterator[Batch]:
        for start in range(0, len(items), self.scoring_batch):
            made = self.batch(items[start : start + self.scoring_batch])
            yield {k: v.to(device) for k, v in made.items()}

    @torch.no_grad()
    def score(self, model: Model, task: Task, kind: str, device: torch.device) -> float:
        """The score on the task's test items, higher is better: the share of rows predicted
        correctly (``"accuracy"``), or minus the mean loss of a row (``"loss"``)."""
        if kind not in ("accuracy", "loss"):
            raise ConfigError(f"score={kind!r}: expected one of {self.scores}")
        total, rows = 0.0, 0
        for batch in self.batches(task.test, device):
            logits, targets = self.predict(model, batch)
            if kind == "loss":
                total -= float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            else:
                total += int((logits.argmax(-1) == targets).sum())
            rows += len(targets)
        return total / max(rows, 1)

    def base_task_of(self, model: Any, count: int, test: int, seed: int) -> Task | None:
        """A task made from the model's own outputs, if the problem allows that; else None."""
        return None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over rows. logits: (N, C). targets: (N,). Raises ConfigError for a target that has no
    column."""
    if len(targets) and int(targets.max()) >= logits.shape[-1]:
        raise ConfigError(
            f"label {int(targets.max())}: the head has {logits.shape[-1]} columns, 0 to "
            f"{logits.shape[-1] - 1}; say how many a task adds, Task(classes=...), and number its "
            "labels after those of the tasks before it"
        )
    return F.cross_entropy(logits, targets)
