"""Fine-tuning of every weight, one task after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..problem import Problem
from ..tasks import Task
from ..training import Training, adamw, fit
from .base import GrowingHead, Method, growing_head


class FineTuning(Method):
    """Sequential fine-tuning. rate: its learning rate relative to `training.lr` (for adapters)."""

    rate = 0.1

    def __init__(self, dense: nn.Module, problem: Problem, training: Training, **_: Any) -> None:
        super().__init__(problem, training)
        self.model = copy.deepcopy(dense).to(self.device)
        self.head: GrowingHead | None = None

    def _grow(self, task: Task) -> None:
        if task.classes:
            self.head = self.head or growing_head(self.model)
            self.head.grow(task.classes)

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        task = tasks[number]
        self._grow(task)
        self.model.train().requires_grad_(True)
        optimizer = adamw(
            list(self.model.parameters()), self.training, self.rate * self.training.lr
        )
        fit(
            f"full: {task.name}", self.problem, [(number, item) for item in task.train],
            lambda batch, task_ids: self.problem.loss(self.model, batch), [optimizer],
            self.training, self.epochs(task), self.validator(task),
        )  # fmt: skip
        self.model.eval()

    def trainable(self) -> int:
        return self.total()

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        for task in tasks[:learnt]:
            self._grow(task)
        self.model.load_state_dict(state)
