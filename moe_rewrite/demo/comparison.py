"""Teach tasks in turn to a converted model and to plain copies; score, print, draw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..continual.matrix import ScoreMatrix
from ..converted.model import MoEModel
from ..utils.atomic_files import write_figure, write_json

REPLAY = 0.1  # share of each older task kept to train the router with


@dataclass
class Part:
    """One task's examples: x, y tensors with one example a row."""

    x: torch.Tensor
    y: torch.Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        return iter(torch.randperm(len(self.x), generator=generator).split(size))


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def train(
    label: str,
    step: Step,
    parameters: list[Any],
    part: Part,
    replay: list[Part] | None,
    epochs: int,
    lr: float = 3e-3,
    task: int = 0,
    batch: int = 64,
) -> None:
    """AdamW over the task's examples, with those kept of older tasks mixed in."""
    from rich.progress import track

    x, y = [part.x], [part.y]
    owner = [torch.full((len(part.x),), task)]
    for older, kept in enumerate(replay or []):
        repeats = max(1, len(part.x) // (2 * len(kept.x)))
        x.append(kept.x.repeat(repeats, *[1] * (kept.x.ndim - 1)))
        y.append(kept.y.repeat(repeats, *[1] * (kept.y.ndim - 1)))
        owner.append(torch.full((len(kept.x) * repeats,), older))
    mixed, task_ids = Part(torch.cat(x), torch.cat(y)), torch.cat(owner)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(task)
    for _ in track(range(epochs), description=f"{label:<32}"):
        for index in mixed.batches(batch, generator):
            loss = step(mixed.x[index], mixed.y[index], task_ids[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compare(
    title: str,
    dense: nn.Module,
    moe: MoEModel,
    names: list[str],
    tasks: list[tuple[Part, Part]],
    task_loss: Callable[[nn.Module], Step],
    score: Callable[[nn.Module, Part], float],
    out: Path,
    epochs: int,
    lr: float,
    batch: int = 64,
) -> dict[str, Any]:
    """Teach tasks 1.. to the converted model and to copies of the dense one; report."""
    kept = [_keep(train) for train, _ in tasks]
    plain, replayed = copy.deepcopy(dense), copy.deepcopy(dense)
    methods: dict[str, nn.Module] = {
        "PMoE (10% replay)": moe, "fine-tuning (10% replay)": replayed, "fine-tuning": plain,
    }  # fmt: skip
    results: dict[str, Any] = {}
    for method, model in methods.items():
        rows = [_scores(model, tasks, score)]
        for t in range(1, len(tasks)):
            model.train()
            if isinstance(model, MoEModel):
                if t > 1:
                    model.expand(1)
                step, parameters = _routed_step(model, task_loss(model)), _groups(model, lr)
            else:
                step, parameters = task_loss(model), list(model.parameters())
            replay = None if method == "fine-tuning" else kept[:t]
            label = f"{method}: {names[t]}"
            train(label, step, parameters, tasks[t][0], replay, epochs, lr, t, batch)
            rows.append(_scores(model, tasks, score))
        matrix = ScoreMatrix(tuple(names), tuple(map(tuple, rows)))
        results[method] = {"R": rows, "forgot": matrix.forgetting}
    report = {"tasks": names, "methods": results}
    _show(title, report)
    _save(title, report, out)
    return report


def _groups(moe: MoEModel, lr: float) -> list[Any]:
    """The router is one linear layer that must follow every task: it learns ten times faster."""
    rows: list[Any] = list(moe.router.rows)
    experts = [p for p in moe.trainable_parameters() if not any(p is row for row in rows)]
    return [{"params": rows, "lr": 10 * lr}, {"params": experts}]


def _keep(part: Part) -> Part:
    count = max(1, int(REPLAY * len(part.x)))
    return Part(part.x[:count], part.y[:count])


def _routed_step(moe: MoEModel, loss: Step) -> Step:
    """The task's loss plus the router's: name the task an example came from (base: task 0)."""

    def step(x: torch.Tensor, y: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        gates = moe.route(x).gates
        target = task.view(-1, *[1] * (gates.ndim - 2)).expand(gates.shape[:-1])
        named = F.nll_loss(gates.clamp_min(1e-9).log().flatten(0, -2), target.flatten())
        return loss(x, y, task) + named

    return step


@torch.no_grad()
def _scores(
    model: nn.Module, tasks: list, score: Callable[[nn.Module, Part], float]
) -> list[float]:
    model.eval()
    return [score(model, test) for _, test in tasks]


def _show(title: str, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for method, result in report["methods"].items():
        table = Table(title=f"{method}: forgot {100 * result['forgot']:.1f} points")
        table.add_column("accuracy after learning")
        for name in report["tasks"]:
            table.add_column(f"on {name}", justify="right")
        for name, row in zip(report["tasks"], result["R"], strict=True):
            table.add_row(name, *(f"{100 * v:.1f}" for v in row))
        Console().print(table)


def _save(title: str, report: dict[str, Any], out: Path) -> None:
    """JSON and a picture of the matrices, each moved into place when it is whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = report["methods"]
    figure, axes = plt.subplots(1, len(methods), figsize=(4 * len(methods), 3.6), squeeze=False)
    for axis, (method, result) in zip(axes[0], methods.items(), strict=True):
        axis.imshow(result["R"], vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"{method}\nforgot {100 * result['forgot']:.1f} points", fontsize=10)
        ticks = range(len(report["tasks"]))
        axis.set_xticks(ticks, report["tasks"], rotation=20, fontsize=8)
        axis.set_yticks(ticks, [f"after {n}" for n in report["tasks"]], fontsize=8)
        for i, row in enumerate(result["R"]):
            for j, v in enumerate(row):
                colour = "black" if v > 0.6 else "white"
                axis.text(j, i, f"{100 * v:.0f}", ha="center", va="center", color=colour)
    figure.tight_layout()
    picture, text = out / f"{title}.png", out / f"{title}.json"
    write_figure(picture, figure, dpi=120)
    write_json(text, report)
    print(f"picture: {picture}   figures: {text}")
