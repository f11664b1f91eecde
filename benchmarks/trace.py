"""Continual learning on TRACE's eight tasks with a pretrained Llama: PMoE and its rivals.

``python -m benchmarks.trace [--quick]``: stories260K learns 150 items a task cut to 192 tokens, 2
epochs, LoRA of rank 8 on layers 3 and 4; mean answer-token loss after all tasks, BWT in nats, and
loss on stories that the model told before. Every method with a learning rate chosen on other items.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .common import arguments, data, finish, save
from .streams import bars, facts, losses, rows, runs, without_matrices

# the best of 1e-3, 3e-3, 1e-2 and 3e-2 by mean loss on TRACE's eval items (seed 100); O-LoRA, full
# fine-tuning, oracle and joint training were not searched: a near method's rate
RATES = {
    "pmoe": 1e-2, "pmoe-gradient": 3e-2, "lora": 3e-3, "replay": 3e-3, "ewc": 3e-3, "lwf": 3e-3,
    "olora": 3e-3, "full": 3e-3, "oracle": 1e-2, "joint": 1e-2,
}  # fmt: skip
LENGTH, SPLIT = 192, 3
FULL = {"items": 150, "tested": 40, "tasks": 8, "epochs": 2}
QUICK = {"items": 24, "tested": 8, "tasks": 2, "epochs": 2}
TITLES = {
    "loss": "mean loss after all tasks",
    "bwt": "BWT, nats",
    "base": "loss on own stories",
}


@cache
def pretrained() -> tuple[Any, Any]:
    """The model, which no method changes, and its problem."""
    from transformers import AutoTokenizer

    from moe_rewrite.continual.text import TextProblem
    from moe_rewrite.loading import load_model

    model = data().parent / "models" / "stories260K"
    return load_model(str(model)), TextProblem(AutoTokenizer.from_pretrained(model), LENGTH)


def job(
    folder: Path, seed: int, method: str, lr: float, items: int, tested: int, tasks: int,
    epochs: int, part: str = "test", split: int = SPLIT, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One method over the stream, scored on the first items of a part; options: of the Setup."""
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.tasks import Task, read_stream
    from moe_rewrite.continual.training import Training

    dense, problem = pretrained()
    stream = [
        Task(t.name, t.train[:items], getattr(t, part)[:tested], epochs=epochs)
        for t in read_stream([data() / "TRACE"])[:tasks]
    ]
    own = problem.own_task(dense, items, tested, seed)
    setup = Setup(split=split, training=Training(epochs=epochs, lr=lr, seed=seed), **options)
    return run(method, dense, problem, stream, setup, own, "loss", folder).figures()


def main() -> None:
    quick = arguments(__doc__ or "").quick
    methods = ("pmoe", "pmoe-gradient", "lora", "oracle") if quick else tuple(RATES)
    sizes = QUICK if quick else FULL
    seeds = (0,) if quick else (0, 1, 2)
    variants = {m: {"method": m, "lr": RATES[m]} | sizes for m in methods}
    found = runs(job, variants, seeds)
    results = {m: losses(f) | facts(f) for m, f in found.items()}
    if not quick:
        figures = {"seeds": len(seeds), "sizes": sizes, "rates": RATES, "methods": results}
        save("trace", figures, bars(results, TITLES))
    columns = ["method", "mean loss", "BWT", "own stories", "trained", "keeps data", "training"]
    finish("trace", columns, rows(results, list(TITLES)), methods=without_matrices(results))


if __name__ == "__main__":
    main()
