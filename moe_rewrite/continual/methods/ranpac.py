"""A ridge head on frozen features, lifted by a fixed random projection (RanPAC, McDonnell et al.
2023, arXiv 2307.02251, section 4): no gradient, no stored sample."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..problem import Problem
from ..tasks import Task
from ..training import Training
from .base import Method, head_place


class RanPAC(Method):
    """The model up to its head, then relu(x W) with M features and a linear map solved from sums.

    gram: (M, M) float64. sums: (M, C) float64. Raises ConfigError unless the model is a classifier.
    """

    def __init__(
        self, dense: nn.Module, problem: Problem, training: Training, projection: int = 2000,
        ridge: float = 1e-3, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(problem, training)
        if problem.scores != ("accuracy", "loss"):
            raise ConfigError("method 'ranpac' needs a classifier: it cannot generate text")
        self.model = copy.deepcopy(dense).requires_grad_(False).eval().to(self.device)
        holder, leaf = head_place(self.model)
        head: Any = getattr(holder, leaf)
        self.ridge = ridge
        draw = torch.Generator().manual_seed(training.seed)
        lift = torch.randn(head.in_features, projection, generator=draw)
        self.head = _Lifted(lift.to(self.device))
        setattr(holder, leaf, self.head)
        self.gram = torch.zeros(projection, projection, dtype=torch.float64, device=self.device)
        self.sums = self.gram.new_zeros(projection, head.out_features)

    def begin(self, base_task: Task | None) -> None:
        if base_task is not None:
            self._observe(base_task)

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        wider = self.sums.new_zeros(len(self.gram), tasks[number].classes or 0)
        self.sums = torch.cat([self.sums, wider], 1)
        self._observe(tasks[number])

    @torch.no_grad()
    def _observe(self, task: Task) -> None:
        self.head.solved = None
        for batch in self.problem.batches(task.train, self.device):
            features, targets = self.problem.predict(self.model, batch)
            f = features.double()
            self.gram += f.T @ f
            self.sums.index_add_(1, targets, f.T)
        self._solve()

    def _solve(self) -> None:
        held = self.gram + self.ridge * self.gram.diagonal().mean() * torch.eye(
            len(self.gram), dtype=torch.float64, device=self.device
        )
        self.head.solved = torch.linalg.solve(held, self.sums).float()

    def trainable(self) -> int:
        return self.sums.numel()

    def state(self) -> dict[str, torch.Tensor]:
        return {"gram": self.gram, "sums": self.sums}

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        self.gram, self.sums = (state[k].to(self.device) for k in ("gram", "sums"))
        self._solve()


class _Lifted(nn.Module):
    """relu(x W), followed by the solved linear map if there is one."""

    def __init__(self, lift: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("lift", lift)
        self.solved: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lifted = (x @ self.lift).relu()  # type: ignore[operator]
        return lifted if self.solved is None else lifted @ self.solved
