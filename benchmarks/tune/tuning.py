"""Learning rates and epochs for `benchmarks.papers.split_digits`, and the image router's `pool`."""

# python -m benchmarks.tune.tuning [--quick]: few digits, scored on MNIST's training images that no
# method is given, under a seed that no other benchmark uses. Best is what has the highest accuracy on
# all digits after all tasks.

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from ..papers.split_digits import METHODS, job
from ..papers.streams import accuracies, runs
from ..tools.report import finish, is_quick, save

SEED = 100  # a seed that no other benchmark uses
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = (3e-3, 1e-2)
EPOCHS, BOUNDS, POOLS = 5, ("oracle", "joint"), (2, 4, 8)
FULL = {
    "train": 150, "tested": 300, "base_tested": 100, "tasks": 5, "epochs": EPOCHS, "part": "eval",
}  # fmt: skip
QUICK = FULL | {"train": 32, "tested": 40, "base_tested": 20, "tasks": 2, "epochs": 1}
Scores = dict[str, float]


def scored(variants: dict[str, dict[str, Any]], sizes: dict[str, Any]) -> list[Scores]:
    """Scores of each variant, in their order."""
    found = runs(job, {f"digits {name}": sizes | v for name, v in variants.items()}, [SEED])
    return [{k: s["mean"] for k, s in accuracies(f).items()} for f in found.values()]


def search(methods: Sequence[str], quick: bool) -> dict[str, dict[float, Scores]]:
    """Scores of every method at the first rates, and at further ones until its best rate has a
    worse one on either side."""
    table: dict[str, dict[float, Scores]] = {method: {} for method in methods}
    asked = [(method, rate) for method in methods for rate in FIRST]
    while asked:
        variants = {f"{m}@{rate:g}": {"method": m, "lr": rate} for m, rate in asked}
        for (m, rate), scores in zip(
            asked, scored(variants, QUICK if quick else FULL), strict=True
        ):
            table[m][rate] = scores
        asked = [] if quick else neighbours(table)
    return table


def best(scores: dict[float, Scores]) -> float:
    return max(scores, key=lambda rate: scores[rate]["last"])


def neighbours(table: dict[str, dict[float, Scores]]) -> list[tuple[str, float]]:
    """Rates beside the best of each method that were not tried."""
    asked = []
    for method, scores in table.items():
        at = RATES.index(best(scores))
        beside = [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES)]
        asked += [(method, rate) for rate in beside if rate not in scores]
    return asked


def longer(rates: dict[str, float], first: dict[str, Scores]) -> dict[int, dict[str, Scores]]:
    """Scores of the upper bounds by epochs, which are doubled until the mean score is better by
    less than 0.02: short of training, they bound nothing. first: at the rates' own epochs."""
    by_epochs = {EPOCHS: first}
    for n in (2 * EPOCHS, 4 * EPOCHS):
        variants = {f"{m}, {n} epochs": {"method": m, "lr": rates[m], "epochs": n} for m in BOUNDS}
        by_epochs[n] = dict(zip(BOUNDS, scored(variants, FULL), strict=True))
        if gain(by_epochs, n) < 0.02:
            break
    return by_epochs


def gain(by_epochs: dict[int, dict[str, Scores]], n: int) -> float:
    """Of n epochs over half of them, in the bounds' mean score."""
    now, half = (mean(s["last"] for s in by_epochs[k].values()) for k in (n, n // 2))
    return now - half


def main() -> None:
    quick = is_quick(__doc__)
    trained = [m for m in METHODS if m != "ranpac"]  # which is solved
    table = search(trained[:1] if quick else trained, quick)
    rates = {method: best(scores) for method, scores in table.items()}
    by_epochs: dict[int, dict[str, Scores]] = {}
    if not quick:
        by_epochs = longer(rates, {m: table[m][rates[m]] for m in BOUNDS})
    epochs = next((n // 2 for n in by_epochs if n > EPOCHS and gain(by_epochs, n) < 0.02), None)
    epochs = epochs or max(by_epochs, default=EPOCHS)
    chosen_pools = POOLS[: 1 if quick else None]
    variants = {
        f"pool {p}": {"method": "pmoe", "lr": rates["pmoe"], "router": {"pool": p}}
        for p in chosen_pools
    }
    by_pool = dict(zip(chosen_pools, scored(variants, QUICK if quick else FULL), strict=True))
    pool = max(by_pool, key=lambda p: by_pool[p]["last"])
    chosen = {"rates": rates, "epochs": epochs, "pool": pool}
    if not quick:
        figures = {"seed": SEED, "sizes": FULL, "chosen": chosen, "table": table}
        save("tuning", figures | {"epochs": by_epochs, "pools": by_pool})
    tried = [
        *((f"{m}, rate {r:g}", s, r == rates[m]) for m in table for r, s in table[m].items()),
        *((f"{m}, {n} epochs", s, n == epochs) for n in by_epochs for m, s in by_epochs[n].items()),
        *((f"pmoe, pool {p}", s, p == pool) for p, s in by_pool.items()),
    ]  # fmt: skip
    keys = ("last", "bwt", "base")
    rows = [(n, *(f"{s[k]:.3f}" for k in keys), "chosen" if c else "") for n, s, c in tried]
    finish("tuning", ["what", "last", "BWT", "CIFAR-10", ""], rows, chosen=chosen)


if __name__ == "__main__":
    main()
