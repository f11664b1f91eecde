"""The interface of methods that learn a stream of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..problem import Problem
from ..tasks import Task
from ..training import Training, accelerator


class Method(ABC):
    """Learns tasks one by one, in the order of their numbers.

    model: the model that is trained.
    keeps_data: the method stores samples of older tasks.
    needs_task_number: the method must know the task's number in scoring.
    """

    keeps_data = False
    needs_task_number = False
    model: Any

    def __init__(self, problem: Problem, training: Training) -> None:
        self.problem, self.training = problem, training
        self.device: torch.device = accelerator(training).device

    def begin(self, base_task: Task | None) -> None:
        """Called before the first task. base_task: what the model can do already, or None."""
        del base_task  # most methods make no use of it

    @abstractmethod
    def learn(self, tasks: Sequence[Task], number: int) -> None:
        """Learn tasks[number]; the tasks before it have been learnt."""

    def model_for(self, number: int | None) -> Any:
        """The model, in eval mode, to score task `number` with; None: the base task."""
        self.model.eval()
        return self.model

    @abstractmethod
    def trainable(self) -> int:
        """Number of parameters trained for the last task."""

    def total(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a run needs to be resumed."""

    @abstractmethod
    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        """Load the state of a method after it had learnt the first `learnt` of these tasks."""

    def epochs(self, task: Task) -> int:
        return task.epochs or self.training.epochs

    def validator(self, task: Task) -> Any:
        """A function that returns the loss on the task's eval items for early stopping, or None."""
        if not task.eval or self.training.patience is None:
            return None
        held_out = Task(task.name, task.train, task.eval)

        def validate() -> float:
            modes = [(m, m.training) for m in self.model.modules()]
            self.model.eval()
            loss = -self.problem.score(self.model, held_out, "loss", self.device)
            for module, mode in modes:
                module.training = mode
            return loss

        return validate


def head_place(model: nn.Module) -> tuple[nn.Module, str]:
    """(parent module, attribute name) of the classification head: the last linear layer.

    Raises ConfigError if there is none.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layer as a head to widen")
    path, _, leaf = names[-1].rpartition(".")
    return model.get_submodule(path), leaf


class GrowingHead(nn.Module):
    """A head with the columns of every task appended."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first
        self.more = nn.ModuleList()

    def grow(self, classes: int) -> list[nn.Parameter]:
        new = nn.Linear(self.first.in_features, classes).to(self.first.weight)
        self.more.append(new)
        return list(new.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(x) for head in (self.first, *self.more)], dim=-1)


def growing_head(model: nn.Module) -> GrowingHead:
    """Replace the model's head by a GrowingHead, in place, and return that."""
    holder, leaf = head_place(model)
    head = GrowingHead(getattr(holder, leaf))
    setattr(holder, leaf, head)
    return head


def require_linear(model: nn.Module, sites: Sequence[str], label: str) -> None:
    """Raises ConfigError unless every site is a linear map."""
    for site in sites:
        kind = type(model.get_submodule(site))
        if kind is not nn.Linear:
            raise ConfigError(
                f"method {label!r} is for linear maps, and {site} is a {kind.__name__}: use another "
                "method for this model"
            )
