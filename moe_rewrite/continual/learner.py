"""PMoE on a stream of tasks: an expert a task, and a router that needs no task identity (Jung & Kim
2024, arXiv 2407.21571), trained by gradient with replay, or solved in closed form without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..converted.model import MoEModel
from ..errors import ConfigError
from ..routing.plan import RoutingPlan
from ..routing.ridge_gate import AnalyticGate
from .buffers import Buffer
from .features import FeatureCache
from .methods.base import Method
from .problem import Batch, Problem
from .tasks import Item, Task
from .training import TaskItem, Training, adamw, fit

BASE = -1  # the task number of the base task


class Learner(Method):
    """Teaches a converted model tasks one after the other.

    The first task goes to the expert that conversion made, if it is untrained; every later task
    adds an expert. An analytic router needs no replay; its sums are saved with the model, so that a
    stream can be continued.

    moe: the converted model.
    gates: of the new expert in training. ``"own"``: it gets every row with gate 1; ``"router"``:
        the router's gates; ``"auto"``: own for an analytic router, else router.
    replay: share of older tasks' items kept for a router that is trained by gradient.
    balanced: keep equally many items of each task; else a reservoir.
    router_rate: the router's learning rate relative to the experts'.
    router_loss: weight of the cross entropy between gates and the task an item came from.
    balance: weight of the squared coefficient of variation of the experts' mean gates (Shazeer et
        al. 2017, arXiv 1701.06538, equation 7). `RoutingPlan.load_balance_loss` would be constant
        where every expert gets every row.
    cache: keeps features at the cut, so that they are computed once a sample.

    Raises ConfigError for unknown `gates`, or a router a layer.
    """

    def __init__(
        self, moe: MoEModel, problem: Problem, training: Training | None = None,
        gates: Literal["own", "router", "auto"] = "auto", replay: float = 0.2,
        balanced: bool = True, router_rate: float = 1.0, router_loss: float = 1.0,
        balance: float = 0.0, cache: FeatureCache | None = None,
    ) -> None:  # fmt: skip
        super().__init__(problem, training or Training())
        if gates not in ("own", "router", "auto"):
            raise ConfigError(f"gates={gates!r}: expected 'own', 'router' or 'auto'")
        if moe.router.by_layer:
            raise ConfigError(
                "a learner trains one router, at the cut, and every layer of this model has one of "
                "its own: convert with FFNExperts(router='cut')"
            )
        self.model: MoEModel = moe.to(self.device)
        self.analytic = isinstance(moe.router, AnalyticGate)
        self.gates = ("own" if self.analytic else "router") if gates == "auto" else gates
        self.keeps_data = not self.analytic and replay > 0
        self.buffer = Buffer(0.0 if self.analytic else replay, balanced, self.training.seed)
        self.router_rate, self.router_loss, self.balance = router_rate, router_loss, balance
        self.cache = cache
        self.learnt: list[str] = []
        self._base_items: list[Item] = []
        self._weights: dict[int, float] = {}
        self.router_optimizer: torch.optim.AdamW | None = None

    # -- the stream -----------------------------------------------------------------------------

    def begin(self, base_task: Task | None) -> None:
        """Show the router the base task: an analytic router adds it to its sums; for one trained by
        gradient, a share of it is replayed with every task."""
        if base_task is None:
            return
        if self.analytic:
            if not self.model.router.knows_base:  # type: ignore[operator]
                self._observe(None, base_task)
        elif self.buffer.ratio:
            self._base_items = list(base_task.train)[
                : max(1, round(self.buffer.ratio * len(base_task.train)))
            ]

    def learn(self, tasks: Sequence[Task], number: int) -> None:
        """Train an expert on tasks[number], and the router; the tasks before it have been learnt."""
        task = tasks[number]
        moe = self.model
        expert = self._new_expert(task)
        if self.analytic:
            self._observe(expert, task)
        moe.activate(expert)
        for other, trained in enumerate(moe.trained):
            if not trained and other != expert:
                moe.deactivate(other)  # untrained: it must not take part in routing
        rows = list(moe.router.rows)
        experts = [p for p in moe.trainable_parameters() if not any(p is row for row in rows)]
        optimizers = [adamw(experts, self.training)]
        if not self.analytic:
            optimizers.append(self._grown_optimizer(rows))
        moe.train()
        fit(
            f"pmoe: {task.name}", self.problem, self._items(tasks, number),
            lambda batch, task_ids: self._loss(batch, task_ids, expert), optimizers,
            self.training, self.epochs(task), self.validator(task),
        )  # fmt: skip
        moe.eval()
        self.buffer.add(number, task)
        self.learnt.append(task.name)

    def _new_expert(self, task: Task) -> int:
        """Index of the next task's expert: the converted model's untrained one, or a new one."""
        moe = self.model
        fresh = moe.num_experts == 1 and not moe.trained[0]
        if not fresh or task.classes:  # a task that adds classes needs an expert with columns
            name = task.name if task.name not in moe.names else None
            moe.expand(1, name=name, classes=task.classes)
        return moe.num_experts - 1

    def _observe(self, expert: int | None, task: Task) -> None:
        batches = self.problem.batches(task.train, self.device)
        self.model.fit_router(expert, (self.problem.inputs(batch) for batch in batches))

    def _items(self, tasks: Sequence[Task], number: int) -> list[TaskItem]:
        older = [(n, tasks[n].train[i]) for n, i in self.buffer.kept]
        base = [(BASE, item) for item in self._base_items]
        items = [(number, item) for item in tasks[number].train] + older + base
        counts = Counter(owner for owner, _ in items)
        self._weights = {n: len(items) / len(counts) / count for n, count in counts.items()}
        return items

    def _grown_optimizer(self, rows: list[Any]) -> torch.optim.AdamW:
        """The router's optimizer, which keeps its state from task to task, with the new rows."""
        rate = self.router_rate * self.training.lr
        if self.router_optimizer is None:
            self.router_optimizer = adamw(rows, self.training, rate)
        known = {id(p) for g in self.router_optimizer.param_groups for p in g["params"]}
        if new := [row for row in rows if id(row) not in known]:
            self.router_optimizer.add_param_group({"params": new, "lr": rate, "initial_lr": rate})
        return self.router_optimizer

    def _loss(self, batch: Batch, task_ids: torch.Tensor, expert: int) -> torch.Tensor:
        moe = self.model
        inputs = self.problem.inputs(batch)
        alone = moe.use_expert(expert) if self.gates == "own" else nullcontext()
        with self._features(inputs), alone:
            loss = self.problem.loss(moe, batch)
        if self.analytic or not (self.router_loss or self.balance):
            return loss
        with self._features(inputs):
            plan = moe.route(**inputs)
        if self.router_loss:
            loss = loss + self.router_loss * self._identity_loss(plan, batch, task_ids)
        if self.balance:
            loss = loss + self.balance * _imbalance(plan.weights, batch.get("attention_mask"))
        return loss

    def _features(self, inputs: Batch) -> Any:
        if self.cache is None:
            return nullcontext()
        return self.model.use_features(self.cache.features(inputs))

    def _identity_loss(
        self, plan: RoutingPlan, batch: Batch, task_ids: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy of the gates with the task that an item came from; all tasks have the same
        weight, however few of their items were kept."""
        gates = plan.gates
        first = 0 if plan.base is None else 1
        offset = self.model.num_experts - 1 - len(self.learnt)  # experts before this stream's
        place = torch.where(task_ids == BASE, 0, task_ids + offset + first)
        shape = (-1, *(1,) * (gates.ndim - 2))
        target = place.view(shape).expand(gates.shape[:-1])
        losses = F.nll_loss(
            gates.clamp_min(1e-9).log().flatten(0, -2), target.flatten(), reduction="none"
        ).view(target.shape)
        weights = torch.tensor([self._weights[n] for n in task_ids.tolist()], device=losses.device)
        losses = losses * weights.view(shape)
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != losses.shape:
            return losses.mean()
        return (losses * mask).sum() / mask.sum()

    # -- the interface of Method ----------------------------------------------------------------

    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.trainable_parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """State of the router's optimizer; experts and router are saved by `save_pretrained`."""
        if self.router_optimizer is None:
            return {}
        state: dict[str, torch.Tensor] = {}
        for number, row in enumerate(self.model.router.rows):
            for name, value in self.router_optimizer.state.get(row, {}).items():
                state[f"router.{number}.{name}"] = torch.as_tensor(value)
        return state

    def restore(self, state: dict[str, torch.Tensor], tasks: Sequence[Task], learnt: int) -> None:
        """See `Method.restore`; the model must be the one that was saved with this state."""
        for number, task in enumerate(tasks[:learnt]):
            self.buffer.add(number, task)
            self.learnt.append(task.name)
        if not self.analytic:
            optimizer = self._grown_optimizer(list(self.model.router.rows))
            for name, value in state.items():
                _, at, part = name.split(".", 2)
                row = self.model.router.rows[int(at)]
                optimizer.state[row][part] = value.clone()


def _imbalance(gates: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The squared coefficient of variation of the experts' mean gates.

    gates: (*rows, E). mask: (B, S), nonzero for rows that count; used if rows are (B, S).
    """
    counted = mask is not None and mask.shape == gates.shape[:-1]
    load = (gates[mask != 0] if counted else gates.flatten(0, -2)).mean(0)
    return load.var(unbiased=False) / load.mean().square().clamp_min(1e-9)


@torch.no_grad()
def router_use(learner: Learner, tasks: Sequence[Task]) -> list[list[float]]:
    """For each task, the mean gates over its test items: the frozen model's, then each expert's."""
    used = []
    for task in tasks:
        total, rows = torch.zeros(1 + learner.model.num_experts, dtype=torch.float64), 0
        for batch in learner.problem.batches(task.test, learner.device):
            gates = learner.model.route(**learner.problem.inputs(batch)).gates.double().cpu()
            gates = gates.flatten(0, -2)
            total[-gates.shape[-1] :] += gates.sum(0)
            rows += len(gates)
        used.append((total / rows).tolist())
    return used
