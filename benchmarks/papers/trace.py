"""Continual learning on TRACE's eight tasks with a pretrained Llama: PMoE and other methods."""

# python -m benchmarks.papers.trace [--quick]: stories260K learns 300 items a task cut to 192 tokens, 3
# epochs, LoRA of rank 8 on layers 3 and 4; mean loss and accuracy of answer tokens after all tasks, BWT
# in nats, and the same scores on stories that the model generated before; then each task by itself.

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from moe_rewrite.utils.text_tables import table

from ..tools.data import data, model_folder
from ..tools.plots import bars
from ..tools.report import finish, is_quick, save
from .streams import facts, losses, others, rows, runs, without_matrices

# the best of 1e-3, 3e-3, 1e-2 and 3e-2 by mean loss on TRACE's eval items (seed 100); O-LoRA, full
# fine-tuning, oracle and joint training were not searched: a near method's rate
RATES = {
    "pmoe": 1e-2, "pmoe-gradient": 3e-2, "lora": 3e-3, "replay": 3e-3, "ewc": 3e-3, "lwf": 3e-3,
    "olora": 3e-3, "full": 3e-3, "oracle": 1e-2, "joint": 1e-2,
}  # fmt: skip
LENGTH, SPLIT = 192, 3
# own texts to score: a single wrongly routed one counts for one per mille, not for five
STORIES = 200
# beside the default of 20%
SPARING = {"replay 5%": {"method": "replay", "lr": RATES["replay"], "replay": 0.05}}
FULL = {"items": 300, "tested": 40, "tasks": 8, "epochs": 3}
QUICK = {"items": 24, "tested": 8, "tasks": 2, "epochs": 2}
TITLES = {
    "loss": "mean loss after all tasks",
    "bwt": "BWT, nats",
    "accuracy": "accuracy",
    "base": "loss on own stories",
    "base accuracy": "accuracy on them",
}


@cache
def pretrained() -> tuple[Any, Any]:
    """The model, which no method changes, and its problem."""
    from transformers import AutoTokenizer

    from moe_rewrite.cli.loading import load_model
    from moe_rewrite.continual.text import TextProblem

    model = model_folder("stories260K")
    return load_model(str(model)), TextProblem(AutoTokenizer.from_pretrained(model), LENGTH)


@cache
def stream_of(
    seed: int, items: int, tested: int, tasks: int, epochs: int, part: str = "test"
) -> tuple[Any, Any, list[Any], Any]:
    """(model, problem, tasks, base task), scored on the first items of a part."""
    from moe_rewrite.continual.tasks import Task, read_stream

    dense, problem = pretrained()
    stream = [
        Task(t.name, t.train[:items], getattr(t, part)[:tested], epochs=epochs)
        for t in read_stream([data() / "TRACE"])[:tasks]
    ]
    return dense, problem, stream, problem.base_task_of(dense, items, STORIES, seed)


def job(
    folder: Path, seed: int, method: str, lr: float, items: int, tested: int, tasks: int,
    epochs: int, part: str = "test", split: int = SPLIT, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One method over the stream; options: of the Setup."""
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.training import Training

    dense, problem, stream, base_task = stream_of(seed, items, tested, tasks, epochs, part)
    setup = Setup(split=split, training=Training(epochs=epochs, lr=lr, seed=seed), **options)
    return run(method, dense, problem, stream, setup, base_task, "loss", folder).figures()


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    tasks = dict(zip(found[0]["tasks"], by_task(found), strict=True))
    return losses(found) | others(found, "accuracy") | {"by_task": tasks} | facts(found)


def by_task(found: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss and accuracy on each task after the last, over the seeds."""
    lost = [mean(-r["R"][-1][j] for r in found) for j in range(len(found[0]["tasks"]))]
    right = [mean(r["other"]["accuracy"][j] for r in found) for j in range(len(lost))]
    return [{"loss": x, "accuracy": y} for x, y in zip(lost, right, strict=True)]


def main() -> None:
    quick = is_quick(__doc__)
    methods = ("pmoe", "lora") if quick else tuple(RATES)
    sizes = QUICK if quick else FULL
    seeds = (0,) if quick else (0, 1, 2)
    asked = {m: {"method": m, "lr": RATES[m]} for m in methods} | ({} if quick else SPARING)
    found = runs(job, {name: options | sizes for name, options in asked.items()}, seeds)
    results = {name: summary(f) for name, f in found.items()}
    if not quick:
        figures = {"seeds": len(seeds), "sizes": sizes, "rates": RATES, "methods": results}
        save("trace", figures, bars({"": results}, TITLES))
    tasks = next(iter(results.values()))["by_task"]
    each = [
        (name, *(f"{t['loss']:.2f} / {t['accuracy']:.3f}" for t in r["by_task"].values()))
        for name, r in results.items()
    ]
    print(table(["loss / accuracy of", *tasks], each, "trace: after all tasks"))
    columns = ["method", *TITLES, "trained", "keeps data", "training"]
    finish("trace", columns, rows(results, list(TITLES)), methods=without_matrices(results))


if __name__ == "__main__":
    main()
