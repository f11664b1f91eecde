"""Three hundred tasks in a row: accuracy, what the router keeps, and what fewer experts cost."""

# python -m benchmarks.papers.many_tasks [--quick]: two class-incremental streams, each task two new
# classes, which widen the head; answers are over all classes, no task identity. "digits": pairs of
# MNIST digits under fixed permutations of the pixels, five pairs a permutation, after a network that
# knows the digits as they are. "clusters": two groups of points at a place of their own, four
# deviations apart. Seed 0 keeps a matrix of sums for each expert, seed 1 shared ones. RanPAC (arXiv
# 2307.02251) is ridge regression of the classes on random features at the same cut. Then 40 permuted
# digits tasks whose experts are joined in pairs, or pruned by use.

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoEModel, TokenRouter

from ..tools.data import mnist
from ..tools.report import finish, is_quick, save
from .streams import spread

BASE, PAIRS, WIDTH = 10, 5, 256
Sums = Literal["each", "shared"]
FULL = {
    "tasks": 300, "train": 200, "test": 20, "epochs": 4, "fewer": 40,
    "base": 10_000, "marks": [20, 50, 100, 200, 300],
}  # fmt: skip
QUICK = {
    "tasks": 5, "train": 60, "test": 20, "epochs": 2, "fewer": 4,
    "base": 1_000, "marks": [5],
}  # fmt: skip
KINDS: tuple[Sums, ...] = ("each", "shared")  # by seed


class Task(NamedTuple):
    """Inputs and labels from 0 on, of items to train on and of others."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


# -- streams --------------------------------------------------------------------------------------


@cache
def digits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = mnist(part)
    return (x.flatten(1) - 0.13) / 0.31, y


def permuted(number: int, seed: int, classes: list[int], size: dict[str, Any]) -> Task:
    """Digits of these classes under permutation `number` of the pixels; labels count in `classes`."""
    order = torch.randperm(784, generator=torch.Generator().manual_seed(1000 * seed + number))
    draw = torch.Generator().manual_seed(777 + 1000 * seed + 10 * number + classes[0])
    parts: list[torch.Tensor] = []
    for part, count in (("train", size["train"]), ("t10k", size["test"])):
        x, y = digits(part)
        found = torch.isin(y, torch.tensor(classes)).nonzero().flatten()
        chosen = found[torch.randperm(len(found), generator=draw)[:count]]
        parts += [x[chosen][:, order], torch.searchsorted(torch.tensor(classes), y[chosen])]
    return Task(*parts)


def digit_pairs(seed: int, size: dict[str, Any]) -> list[Task]:
    pairs = [[2 * p, 2 * p + 1] for p in range(PAIRS)]
    return [permuted(n // PAIRS, seed, pairs[n % PAIRS], size) for n in range(size["tasks"])]


def clusters(seed: int, size: dict[str, Any]) -> list[Task]:
    draw = torch.Generator().manual_seed(seed)

    def task() -> Task:
        centre, plane = torch.randn(2, 784, generator=draw)
        parts: list[torch.Tensor] = []
        for count in (size["train"], size["test"]):
            y = torch.randint(2, (count,), generator=draw)
            apart = (4.0 * y - 2).unsqueeze(1) * plane / plane.norm()
            parts += [centre / 4 + apart + torch.randn(count, 784, generator=draw), y]
        return Task(*parts)

    return [task() for _ in range(size["tasks"])]


# -- the model, and how it learns -------------------------------------------------------------------


def network() -> nn.Sequential:
    widths = (784, WIDTH, WIDTH, WIDTH)
    blocks = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(widths, widths[1:], strict=False)]  # fmt: skip
    return nn.Sequential(*blocks, nn.Linear(WIDTH, BASE))


def fit(model: nn.Module, parameters: Any, x: torch.Tensor, y: torch.Tensor, epochs: int, batch: int, rate: float) -> None:  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=draw).split(batch):
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()


@cache
def pretrained(count: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = network()
    x, y = digits("train")
    fit(model, model.parameters(), x[:count], y[:count], 3, 64, 1e-3)
    return model.eval()


def converted(size: dict[str, Any], seed: int, sums: Sums = "each") -> MoEModel:
    router = TokenRouter(fit="analytic", top_k=1, sums=sums)
    dense = pretrained(size["base"], seed)
    x, _ = digits("train")
    moe = moe_rewrite.convert(
        dense, split=1, router=router, experts=LoRAExperts(rank=4), example_inputs=x[:2],
        verify=False,
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    moe.remember(list(x[: size["base"]].split(500)))
    return moe


def learn(moe: MoEModel, task: Task, first: int | None, epochs: int) -> None:
    """Train an expert of its own on a task. first: the class of label 0; None: no new classes."""
    classes = None if first is None else 2
    moe.expand(1, classes=classes)
    moe.train()
    y = task.y if first is None else task.y + first
    fit(moe, moe.trainable_parameters(), task.x, y, epochs, 50, 3e-3)
    moe.eval()


@torch.no_grad()
def right(moe: MoEModel, task: Task, first: int) -> float:
    return float((moe(task.test_x).argmax(1) == task.test_y + first).float().mean())


# -- what is measured -------------------------------------------------------------------------------


@torch.no_grad()
def state_of(moe: MoEModel, tasks: list[Task]) -> dict[str, float]:
    """Figures after the tasks so far; experts begin at 1, the one of the conversion is removed."""
    x, y = torch.cat([t.test_x for t in tasks]), torch.cat([t.test_y for t in tasks])
    count = len(tasks[0].test_y)
    number = torch.arange(len(tasks)).repeat_interleave(count)
    logits = torch.cat([moe(part) for part in x.split(1000)])
    routed = torch.cat([moe.route(part).selected for part in x.split(1000)])
    own_x, own_y = (t[:1000] for t in digits("t10k"))
    told = []
    for n, task in enumerate(tasks):
        with moe.use_expert(n):
            own = moe(task.test_x)[:, BASE + 2 * n : BASE + 2 * n + 2]
        told.append(float((own.argmax(1) == task.test_y).float().mean()))
    start = time.process_time()
    moe.router.solve()
    solve = time.process_time() - start
    sums = sum(
        b.numel() * b.element_size() for n, b in moe.router.named_buffers() if "moments." in n
    )
    saved = sum(t.numel() * t.element_size() for t in moe.saved_tensors().values())
    return {
        "accuracy": float((logits.argmax(1) == y + BASE + 2 * number).float().mean()),
        "routing": float((routed == number + 1).float().mean()), "told": mean(told),
        "base": float((moe(own_x).argmax(1) == own_y).float().mean()),
        "sums_mb": sums / 1e6, "whole_mb": (len(tasks) + 1) * moe.router.size**2 * 8 / 1e6,
        "saved_mb": saved / 1e6, "solve_ms": 1e3 * solve,
    }  # fmt: skip


def ranpac(moe: MoEModel, tasks: list[Task], size: dict[str, Any]) -> float:
    """Accuracy of ridge regression of all classes on random features at the cut, with the best of four
    ridges on a fifth of the training items."""
    gate: Any = moe.router
    total = BASE + 2 * len(tasks)

    def features(x: torch.Tensor) -> torch.Tensor:
        read, _, _ = gate._read(moe.features(x), None, None)
        return read.double()

    def sums(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        gram = torch.zeros(gate.size - 1, gate.size - 1, dtype=torch.float64)
        sides = torch.zeros(gate.size - 1, total, dtype=torch.float64)
        for x, y in parts:
            f = features(x)
            gram += f.T @ f
            sides.index_add_(1, y, f.T)
        return gram, sides

    def accuracy(rows: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return mean(float(((features(x) @ rows).argmax(1) == y).float().mean()) for x, y in parts)

    base_x, base_y = digits("train")
    known = [(base_x[: size["base"]][i : i + 500], base_y[: size["base"]][i : i + 500]) for i in range(0, size["base"], 500)]  # fmt: skip
    new = [(t.x, t.y + BASE + 2 * n) for n, t in enumerate(tasks)]
    cut = size["train"] * 4 // 5
    gram, sides = sums(known + [(x[:cut], y[:cut]) for x, y in new])
    scores = {}
    for ridge in (1e-4, 1e-3, 1e-2, 1e-1):
        eye = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        scores[ridge] = accuracy(torch.linalg.solve(gram + eye, sides), [(x[cut:], y[cut:]) for x, y in new])  # fmt: skip
    gram, sides = sums(known + new)
    best = max(scores, key=lambda ridge: scores[ridge])
    eye = best * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    rows = torch.linalg.solve(gram + eye, sides)
    return accuracy(rows, [(t.test_x, t.test_y + BASE + 2 * n) for n, t in enumerate(tasks)])


def stream(
    of: Callable[[int, dict[str, Any]], list[Task]], seed: int, size: dict[str, Any]
) -> dict[str, Any]:
    start, tasks = time.process_time(), of(seed, size)
    moe = converted(size, seed, KINDS[seed])
    once, marks = [], {}
    for number, task in enumerate(track(tasks, f"seed {seed}")):
        first = BASE + 2 * number
        learn(moe, task, first, size["epochs"])
        if number == 0:
            moe.remove(0)  # the expert of the conversion, which has no classes
        once.append(right(moe, task, first))
        if number + 1 in size["marks"]:
            marks[number + 1] = state_of(moe, tasks[: number + 1])
    last = [right(moe, task, BASE + 2 * n) for n, task in enumerate(tasks)]
    return {
        "marks": marks, "bwt": mean(b - a for a, b in zip(once[:-1], last[:-1], strict=True)),
        "ranpac": ranpac(moe, tasks, size), "seconds": time.process_time() - start,
    }  # fmt: skip


# -- fewer experts ----------------------------------------------------------------------------------


def fewer(size: dict[str, Any], seed: int) -> dict[str, Any]:
    """All ten digits under permutations, no new classes: accuracy before and after."""
    tasks = [permuted(n, seed, list(range(BASE)), size) for n in range(size["fewer"])]
    moe = converted(size, seed)
    for task in tasks:
        learn(moe, task, None, size["epochs"])
    moe.remove(0)

    def accuracy(of: MoEModel, some: list[Task]) -> float:
        return mean(right(of, task, 0) for task in some)

    half = len(tasks) // 2
    joined, pruned = copy.deepcopy(moe), copy.deepcopy(moe)
    names = list(moe.names)
    losses = [
        mean(joined.join_experts(a, b).values())
        for a, b in zip(names[::2], names[1::2], strict=False)
    ]
    gone = pruned.prune([t.test_x for t in tasks[:half]], below=0.1 / half)
    return {
        "experts": len(names), "before": accuracy(moe, tasks),
        "joined": {"experts": joined.num_experts, "accuracy": accuracy(joined, tasks), "lost": mean(losses)},
        "frozen": mean(float((moe.to_dense()(t.test_x).argmax(1) == t.test_y).float().mean()) for t in tasks),
        "pruned": {
            "experts": pruned.num_experts, "gone": len(gone),
            "used": accuracy(pruned, tasks[:half]), "used_before": accuracy(moe, tasks[:half]),
            "others": accuracy(pruned, tasks[half:]), "others_before": accuracy(moe, tasks[half:]),
        },
    }  # fmt: skip


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    size = QUICK if quick else FULL
    found: dict[str, Any] = {}
    for name, of in (("digits", digit_pairs), ("clusters", clusters)):
        by_seed = [stream(of, seed, size) for seed in range(1 if quick else len(KINDS))]
        last = [s["marks"][size["tasks"]] for s in by_seed]
        found[name] = {
            "marks": [s["marks"] for s in by_seed],
            **{k: spread([m[k] for m in last]) for k in ("accuracy", "routing", "told", "base")},
            **{k: spread([s[k] for s in by_seed]) for k in ("bwt", "ranpac", "seconds")},
        }
    found["fewer"] = fewer(size, 0)
    if not quick:
        save("many_tasks", found)
    rows = [
        (name, *(f"{of[k]['mean']:.3f} ± {of[k]['spread']:.3f}" for k in ("accuracy", "routing", "told", "ranpac", "bwt", "base")))
        for name, of in found.items() if "ranpac" in of
    ]  # fmt: skip
    columns = [
        "stream",
        "accuracy",
        "routed right",
        "told the task",
        "RanPAC",
        "BWT",
        "digits as they are",
    ]
    finish("many_tasks", columns, rows, **found)


if __name__ == "__main__":
    main()
