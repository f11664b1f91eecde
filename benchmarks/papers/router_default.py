"""Which router is convert's default: for who trains once, and for who then adds a task."""

# python -m benchmarks.papers.router_default [--quick]: the streams of `router_fit`, smaller, in a plain
# loop, three seeds. "untold": an analytic router that was never told what the model did before. Once:
# the score on the first task after its training, as `eval()` leaves the model; alone: the same with
# the expert's gate at 1, as LoRA without a router has it. Twice: the mean over both tasks at the end.

from __future__ import annotations

from statistics import mean, pstdev
from typing import Any

from ..tools.report import finish, is_quick, mean_and_spread, save
from . import router_fit
from .router_fit import CPU, EPOCHS, RATES, STREAMS, Stream

SEEDS = (0, 1, 2)
SMALLER: dict[str, dict[str, int]] = {
    "text": {"tasks": 2, "items": 48},
    "images": {"tasks": 2, "train": 80},
}
COLUMNS = ("once", "alone", "base after once", "twice", "bwt", "base after twice")


def job(stream: Stream, router: str, epochs: int, lr: float, seed: int) -> dict[str, float]:
    kind = "analytic" if router == "untold" else router
    moe = router_fit.converted(stream, kind, seed)
    if router == "analytic":
        stream.remember(moe)
    sign = -1.0 if stream.score == "loss" else 1.0

    def score(task: Any) -> float:
        return sign * stream.problem.score(moe, task, stream.score, CPU)

    def train(task: Any, number: int) -> None:
        if number or task.classes:
            moe.expand(1, name=task.name, classes=task.classes)
        router_fit.plain(moe, stream.problem, task.train, epochs, lr)

    first, second = stream.tasks[:2]
    train(first, 0)
    found = {"once": score(first), "base after once": score(stream.base)}
    if kind != "patch":
        with moe.use_expert(len(moe.names) - 1):
            found["alone"] = score(first)
    train(second, 1)
    older = score(first)
    return found | {
        "twice": (older + score(second)) / 2,
        "bwt": sign * (older - found["once"]),
        "base after twice": score(stream.base),
    }


def over_seeds(values: list[float]) -> dict[str, Any]:
    return {"each": values, "mean": mean(values), "spread": pstdev(values)}


def main() -> None:
    quick = is_quick(__doc__)
    results: dict[str, dict[str, Any]] = {}
    for name in ("text",) if quick else STREAMS:
        stream = STREAMS[name](quick, **SMALLER.get(name, {}))
        untold = {"untold": RATES[name]["analytic"]}
        rates = untold if quick else RATES[name] | untold
        for router, lr in rates.items():
            epochs, seeds = (1, SEEDS[:1]) if quick else (EPOCHS[name], SEEDS)
            found = [job(stream, router, epochs, lr, seed) for seed in seeds]
            results[f"{name}, {router}"] = {
                column: over_seeds([f[column] for f in found]) for column in found[0]
            }
    if not quick:
        save("router_default", {"seeds": len(SEEDS), "sizes": SMALLER, "results": results})
    rows = [
        (name, *(mean_and_spread(r[c]) if c in r else "" for c in COLUMNS))
        for name, r in results.items()
    ]
    finish("router_default", ["stream, router", *COLUMNS], rows, results=results)


if __name__ == "__main__":
    main()
