"""Methods that train PEFT's LoRA adapters at the sites where experts would be.

One adapter for all tasks (plain, with replay, EWC, LwF, joint), or one a task (O-LoRA, oracle).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import require_package
from ..buffers import Buffer
from ..problem import Batch, Problem, cross_entropy
from ..tasks import Task
from ..training import TaskItem, Training, adamw, fit
from .base import GrowingHead, Method, growing_head

LEARNT = ("lora_", ".more.")  # in the names of adapters' tensors and of added columns


class Adapters(Method):
    """Sequential LoRA: one adapter, trained on each task in turn.

    sites: dotted names of the modules that get an adapter.

    Older columns of a growing head are trained only if older tasks' samples are replayed.
    """

    label = "lora"
    one_each = False
    rate = 1.0  # the learning rate relative to `training.lr`

    def __init__(
        self, dense: nn.Module, problem: Problem, training: Training, sites: Sequence[str],
        rank: int = 8, alpha: float = 16.0, replay: float = 0.2, balanced: bool = True,
        **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(problem, training)
        self.model = copy.deepcopy(dense).requires_grad_(False).to(self.device)
        self.sites, self.rank, self.alpha = list(sites), rank, alpha
        self.buffer = Buffer(replay, balanced, training.seed)
        self.head: GrowingHead | None = None
        self.names: list[str] = []
        self._trained: list[nn.Parameter] = []

    # -- adapters -------------------------------------------------------------------------------

    def _grow(self, task: Task, number: int) -> None:
        if not self.names or self.one_each:
            self._add_adapter(f"task{number}")
        self._grow_head(task)

    def _grow_head(self, task: Task) -> None:
        if task.classes:
            self.head = self.head or growing_head(self.model)
            self.head.grow(task.classes)

    def _add_adapter(self, name: str) -> None:
        self._inject(name)
        self.names.append(name)

    def _inject(self, name: str, **options: Any) -> None:
        require_package("peft", "continual", f"method {self.label!r}")
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.rank, lora_alpha=int(self.alpha), target_modules=self.sites, **options
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # intended
            inject_adapter_in_model(config, self.model, adapter_name=name)
        self.model.to(self.device)

    def _use(self, names: Sequence[str]) -> None:
        """Activate these adapters only; without any, the model is the original one."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(bool(names))
                if names:
                    module.set_adapter(list(names))

    def _of(self, name: str) -> list[nn.Parameter]:
        return [p for n, p in self.model.named_parameters() if f".{name}." in n]

    # -- learning -------------------------------------------------------------------------------

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        task = tasks[number]
        self._grow(task, number)
        self._use(self.names if self.one_each else self.names[-1:])
        self.model.requires_grad_(False)
        self._trained = self._of(self.names[-1]) + self._columns()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self.before_task(task)
        _train_but_norms(self.model)
        fit(
            f"{self.label}: {task.name}", self.problem, self.items(tasks, number), self.loss,
            [adamw(self._trained, self.training, self.rate * self.training.lr)], self.training,
            self.epochs(task), self.validator(task),
        )  # fmt: skip
        self.model.eval()
        self.after_task(task, number)

    def _columns(self) -> list[nn.Parameter]:
        if self.head is None:
            return []
        heads = list(self.head.more) if self.keeps_data else [self.head.more[-1]]
        return [p for head in heads for p in head.parameters()]

    def items(self, tasks: Sequence[Task], number: int) -> list[TaskItem]:
        return [(number, item) for item in tasks[number].train]

    def loss(self, batch: Batch, task_ids: torch.Tensor) -> torch.Tensor:
        return self.problem.loss(self.model, batch)

    def before_task(self, task: Task) -> None:
        """Hook: the adapter is in place, nothing is trained yet."""

    def after_task(self, task: Task, number: int) -> None:
        """Hook: the task is learnt."""

    def trainable(self) -> int:
        return sum(p.numel() for p in self._trained)

    # -- saving ---------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        learnt = self.model.state_dict()
        return {k: v for k, v in learnt.items() if any(x in k for x in LEARNT)}

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        for number, task in enumerate(tasks[:learnt]):
            self._grow(task, number)
            self.buffer.add(number, task)
        self._trained = self._of(self.names[-1]) + self._columns()
        self.model.load_state_dict(state, strict=False)
        self._use(self.names if self.one_each else self.names[-1:])
        self.model.eval()


def _train_but_norms(model: nn.Module) -> None:
    """Training mode, but frozen batch norms keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class Replay(Adapters):
    """One adapter, trained with samples of older tasks mixed in (Chaudhry et al. 2019, arXiv
    1902.10486)."""

    label, keeps_data = "replay", True

    def items(self, tasks: Sequence[Task], number: int) -> list[TaskItem]:
        older = [(n, tasks[n].train[i]) for n, i in self.buffer.kept]
        return super().items(tasks, number) + older

    def after_task(self, task: Task, number: int) -> None:
        self.buffer.add(number, task)


class Joint(Adapters):
    """Train on all tasks at once, at the first one: an upper bound, not a method for streams."""

    label, keeps_data = "joint", True

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        if number == 0:
            super().learn(tasks, 0)

    def items(self, tasks: Sequence[Task], number: int) -> list[TaskItem]:
        for later in tasks[1:]:
            if later.classes and self.head is not None:
                self._trained += self.head.grow(later.classes)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        return [(n, item) for n, task in enumerate(tasks) for item in task.train]

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        super().restore(state, tasks, len(tasks))


class EWC(Adapters):
    """A penalty keeps each weight of the adapter near its old value, by its Fisher information
    (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3, summed over tasks)."""

    label, strength, samples = "ewc", 100.0, 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fisher: list[torch.Tensor] = []
        self.anchor: list[torch.Tensor] = []

    def after_task(self, task: Task, number: int) -> None:
        held = self._of(self.names[-1])
        squares = [torch.zeros_like(p) for p in held]
        items = list(task.train)[: self.samples]
        for item in items:
            batch = {k: v.to(self.device) for k, v in self.problem.batch([item]).items()}
            gradients = torch.autograd.grad(self.problem.loss(self.model, batch), held)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.square() / len(items)
        older = self.fisher or [torch.zeros_like(p) for p in held]
        self.fisher = [a + b for a, b in zip(older, squares, strict=True)]
        self.anchor = [p.detach().clone() for p in held]

    def loss(self, batch: Batch, task_ids: torch.Tensor) -> torch.Tensor:
        held = self._of(self.names[-1])
        moved = [
            (f * (p - a).square()).sum()
            for f, p, a in zip(self.fisher, held, self.anchor, strict=False)
        ]
        return super().loss(batch, task_ids) + self.strength / 2 * sum(moved)

    def state(self) -> dict[str, torch.Tensor]:
        fisher = {f"fisher.{i}": f for i, f in enumerate(self.fisher)}
        return super().state() | fisher

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        model = {k: v for k, v in state.items() if not k.startswith("fisher.")}
        super().restore(model, tasks, learnt)
        self.fisher = [state[f"fisher.{i}"] for i in range(len(state) - len(model))]
        self.anchor = [p.detach().clone() for p in self._of(self.names[-1])]


class LwF(Adapters):
    """On the new task's inputs, outputs are distilled from the model before the task (Li & Hoiem
    2016, arXiv 1606.09282, equation 3)."""

    label, strength, temperature = "lwf", 1.0, 2.0

    def before_task(self, task: Task) -> None:
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()

    def after_task(self, task: Task, number: int) -> None:
        del self.teacher

    def loss(self, batch: Batch, task_ids: torch.Tensor) -> torch.Tensor:
        logits, targets = self.problem.predict(self.model, batch)
        with torch.no_grad():
            before, _ = self.problem.predict(self.teacher, batch)
        known = before.shape[-1] - self._new_classes()
        soft = (before[:, :known] / self.temperature).log_softmax(-1)
        now = (logits[:, :known] / self.temperature).log_softmax(-1)
        drift = F.kl_div(now, soft, reduction="batchmean", log_target=True)
        return cross_entropy(logits, targets) + self.strength * self.temperature**2 * drift

    def _new_classes(self) -> int:
        return 0 if self.head is None else self.head.more[-1].out_features  # type: ignore[return-value]


class OLoRA(Adapters):
    """An adapter a task, all active; a loss keeps the new one's A orthogonal to the older ones'
    (Wang et al. 2023, arXiv 2310.14152, equations 6 to 8)."""

    label, one_each, strength = "olora", True, 0.5

    def loss(self, batch: Batch, task_ids: torch.Tensor) -> torch.Tensor:
        overlap = torch.zeros((), device=self.device)
        for module in self.model.modules():
            a = getattr(module, "lora_A", None)
            if isinstance(a, nn.ModuleDict) and len(a) > 1:
                new, *older = (a[n].weight.flatten(1) for n in reversed(self.names))  # type: ignore[operator]
                overlap = overlap + sum((new @ old.detach().T).abs().sum() for old in older)
        return super().loss(batch, task_ids) + self.strength * overlap


class Oracle(Adapters):
    """An adapter a task, chosen by the task's number at inference: an upper bound."""

    label, one_each, needs_task_number = "oracle", True, True

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        super().learn(tasks, number)
        self._use(self.names[-1:])

    def before_task(self, task: Task) -> None:
        self._use(self.names[-1:])
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def model_for(self, number: int | None) -> Any:
        known = number is not None and number < len(self.names)
        self._use([self.names[number]] if known else [])  # type: ignore[index]
        return super().model_for(number)
