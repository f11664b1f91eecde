"""The training loop of all methods, on accelerate, with a progress bar."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import ConfigError, require_package
from .problem import Batch, Problem
from .tasks import Item

TaskItem = tuple[int, Item]  # (number of the task that the item belongs to, item)
Loss = Callable[[Batch, torch.Tensor], torch.Tensor]  # (batch, its (B,) task numbers) -> loss


@dataclass(frozen=True)
class Training:
    """How a task is trained. Raises ConfigError for a wrong value.

    epochs: of tasks that have no number of their own.
    lr: learning rate of experts and adapters.
    weight_decay: of AdamW.
    batch_size: items a step.
    schedule: ``"linear"``: the rate falls to zero over a task; ``"constant"``.
    patience: stop a task after this many epochs without a lower loss on its eval items, and return
        to the best weights; None trains all epochs.
    mixed_precision: accelerate's ``"no"``, ``"bf16"`` or ``"fp16"``.
    clip: largest norm of the gradient.
    seed: of everything random.
    """

    epochs: int = 3
    lr: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 8
    schedule: Literal["linear", "constant"] = "linear"
    patience: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1:
                raise ConfigError(f"{name}={n!r}: expected an int >= 1")
        if not self.lr > 0:
            raise ConfigError(f"lr={self.lr!r}: expected a number > 0")
        if self.schedule not in ("linear", "constant"):
            raise ConfigError(f"schedule={self.schedule!r}: expected 'linear' or 'constant'")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(
                f"mixed_precision={self.mixed_precision!r}: expected no, bf16 or fp16"
            )


def accelerator(training: Training) -> Any:
    require_package("accelerate", "continual", "training")
    from accelerate import Accelerator

    return Accelerator(mixed_precision=training.mixed_precision)


def fit(
    label: str,
    problem: Problem,
    items: Sequence[TaskItem],
    loss: Loss,
    optimizers: Sequence[torch.optim.Optimizer],
    training: Training,
    epochs: int,
    validate: Callable[[], float] | None = None,
) -> None:
    """Minimise `loss` over batches of these items, in an order given by the seed and the label.

    validate: returns the loss on held-out items, for early stopping.
    """
    helper = accelerator(training)
    prepared = [helper.prepare_optimizer(o) for o in optimizers]
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    steps = epochs * -(-len(items) // training.batch_size)
    schedules = [_schedule(o, training, steps) for o in optimizers]
    best: tuple[float, list[torch.Tensor]] | None = None
    stale = 0
    with _bar(label, steps) as advance:
        for epoch in range(epochs):
            for batch, task_ids in _batches(problem, items, training, f"{label}/{epoch}"):
                batch = {k: v.to(helper.device) for k, v in batch.items()}
                with helper.autocast():
                    value = loss(batch, task_ids.to(helper.device))
                helper.backward(value)
                helper.clip_grad_norm_(parameters, training.clip)
                for optimizer in prepared:
                    optimizer.step()
                    optimizer.zero_grad()
                for schedule in schedules:
                    schedule.step()
                advance(f"loss {float(value.detach()):.3f}")
            if validate is None or training.patience is None:
                continue
            now = validate()
            if best is None or now < best[0]:
                best, stale = (now, [p.detach().clone() for p in parameters]), 0
            elif (stale := stale + 1) >= training.patience:
                break
    if best is not None:
        with torch.no_grad():
            for parameter, kept in zip(parameters, best[1], strict=True):
                parameter.copy_(kept)


def adamw(groups: Sequence[Any], training: Training, lr: float | None = None) -> torch.optim.AdamW:
    rate = training.lr if lr is None else lr
    return torch.optim.AdamW(groups, lr=rate, weight_decay=training.weight_decay)


def _schedule(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> Any:
    """The schedule from the task's initial rate, which an optimizer that is used for several tasks
    keeps as ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"])

    def share(step: int) -> float:
        return 1.0 if training.schedule == "constant" else max(0.0, 1 - step / steps)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _batches(
    problem: Problem, items: Sequence[TaskItem], training: Training, name: str
) -> Iterator[tuple[Batch, torch.Tensor]]:
    order = list(range(len(items)))
    random.Random(f"{training.seed}/{name}").shuffle(order)
    for start in range(0, len(order), training.batch_size):
        chosen = [items[i] for i in order[start : start + training.batch_size]]
        yield problem.batch([item for _, item in chosen]), torch.tensor([n for n, _ in chosen])


class _bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        from rich.progress import Progress

        self.progress = Progress(transient=True)
        self.progress.disable = not self.progress.console.is_terminal
        self.task = self.progress.add_task(label, total=total)
        self.label = label

    def __enter__(self) -> Callable[[str], None]:
        self.progress.start()
        return lambda text: self.progress.update(
            self.task, advance=1, description=f"{self.label}: {text}"
        )

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
