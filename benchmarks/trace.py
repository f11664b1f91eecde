"""Continual learning on TRACE's eight tasks with a pretrained Llama: PMoE and its rivals.

``python -m benchmarks.trace [--quick]``: stories260K learns 150 items a task cut to 192 tokens, 2
epochs, LoRA of rank 8 on layers 3 and 4; mean answer-token loss after all tasks, BWT in nats, and
loss on stories that the model told before. Every method with a learning rate chosen on other items.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from .common import arguments, data, finish, save

# the best of 1e-3, 3e-3, 1e-2 and 3e-2 by mean loss on TRACE's eval items (seed 100); O-LoRA, full
# fine-tuning, oracle and joint training were not searched: a near method's rate
RATES = {
    "pmoe": 1e-2, "pmoe-gradient": 3e-2, "lora": 3e-3, "replay": 3e-3, "ewc": 3e-3, "lwf": 3e-3,
    "olora": 3e-3, "full": 3e-3, "oracle": 1e-2, "joint": 1e-2,
}  # fmt: skip
LENGTH, EPOCHS, SPLIT = 192, 2, 3


def job(method: str, seed: int, items: int, tested: int, tasks: int, folder: str) -> dict[str, Any]:
    """One method over the stream; goes on where a former process stopped."""
    from transformers import AutoTokenizer

    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.tasks import Task, read_stream
    from moe_rewrite.continual.text import TextProblem
    from moe_rewrite.continual.training import Training
    from moe_rewrite.loading import load_model

    torch.set_num_threads(1)
    model = data().parent / "models" / "stories260K"
    dense: Any = load_model(str(model))
    problem = TextProblem(AutoTokenizer.from_pretrained(model), LENGTH)
    stream = [
        Task(t.name, t.train[:items], t.test[:tested], epochs=EPOCHS)
        for t in read_stream([data() / "TRACE"])[:tasks]
    ]
    own = problem.own_task(dense, items, tested, seed)
    training = Training(epochs=EPOCHS, lr=RATES[method], seed=seed)
    setup = Setup(split=SPLIT, training=training)
    out = Path(folder) / f"{method}-{seed}"
    return run(method, dense, problem, stream, setup, own, "loss", out).figures()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds; losses, lower is better."""

    def both(values: list[float]) -> dict[str, float]:
        return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else 0.0}

    return {
        "loss": both([-r["op"] for r in runs]), "bwt": both([r["bwt"] for r in runs]),
        "base": both([-r["base_after"] for r in runs]), "frozen_base": -runs[0]["base_before"],
        "frozen": both([-mean(r["before"]) for r in runs]), "trainable": runs[0]["trainable"],
        "keeps_data": runs[0]["keeps_data"], "seconds": mean(r["seconds"] for r in runs),
        "R": [r["R"] for r in runs], "router_use": runs[0]["router_use"],
    }  # fmt: skip


def draw(results: dict[str, dict[str, Any]]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    titles = {
        "loss": "mean loss after all tasks",
        "bwt": "BWT, nats",
        "base": "loss on own stories",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        means, spreads = ([r[key][k] for r in results.values()] for k in ("mean", "spread"))
        axis.barh(list(results), means, xerr=spreads, capsize=2)
        axis.invert_yaxis()
        axis.set_title(title)
    figure.tight_layout()
    return figure


def main() -> None:
    quick = arguments(__doc__ or "").quick
    seeds = (0,) if quick else (0, 1, 2)
    sizes = (24, 8, 2) if quick else (150, 40, 8)
    methods = ["pmoe", "pmoe-gradient", "lora", "oracle"] if quick else list(RATES)
    folder = os.environ.get("MOE_REWRITE_RUNS") or tempfile.mkdtemp()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {(m, s): pool.submit(job, m, s, *sizes, folder) for s in seeds for m in methods}
        from rich.progress import track

        figures = {key: future.result() for key, future in track(jobs.items(), "runs")}
    results = {m: summary([figures[m, s] for s in seeds]) for m in methods}
    if not quick:
        save("trace", {"seeds": len(seeds), "rates": RATES, "methods": results}, draw(results))
    rows = [
        (name, *(f"{r[k]['mean']:.3f} ± {r[k]['spread']:.3f}" for k in ("loss", "bwt", "base")),
         r["trainable"], "yes" if r["keeps_data"] else "no", f"{r['seconds']:.0f} s")
        for name, r in results.items()
    ]  # fmt: skip
    columns = ["method", "mean loss", "BWT", "own stories", "trained", "keeps data", "training"]
    short = {m: {k: v for k, v in r.items() if k not in ("R",)} for m, r in results.items()}
    finish("trace", columns, rows, methods=short)


if __name__ == "__main__":
    main()
