"""Learning rates of every method over a stream, and the image router's `pool`, on held-out items.

``python -m benchmarks.tuning [--quick]``: few items of TRACE (scored on its eval items) and of
MNIST (scored on training images that no method is given), under a seed that no other benchmark
uses. What is best by the score after all tasks is what `benchmarks.trace` and
`benchmarks.split_digits` run with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

from . import split_digits, trace
from .common import arguments, finish, machine
from .streams import RESULTS, accuracies, losses, runs

SEED = 100  # of no other benchmark
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = (3e-3, 1e-2)
EPOCHS, BOUNDS, POOLS = 5, ("oracle", "joint"), (2, 4, 8)
TRACE = {"items": 80, "tested": 12, "tasks": 8, "epochs": 2, "part": "eval"}
DIGITS = {
    "train": 150, "tested": 300, "base_tested": 100, "tasks": 5, "epochs": EPOCHS, "part": "eval",
}  # fmt: skip
FEW = {
    "trace": {"items": 16, "tested": 4, "tasks": 1, "epochs": 1},
    "digits": {"train": 32, "tested": 40, "base_tested": 20, "tasks": 2, "epochs": 1},
}  # fmt: skip
Table = dict[str, dict[float, dict[str, float]]]


def search(stream: str, methods: Sequence[str], quick: bool) -> Table:
    """Scores of every method at the first rates, and at further ones until its best rate has a
    worse one on either side."""
    module: Any = trace if stream == "trace" else split_digits
    sizes = (TRACE if stream == "trace" else DIGITS) | (FEW[stream] if quick else {})
    table: Table = {method: {} for method in methods}
    asked = [(method, rate) for method in methods for rate in FIRST]
    while asked:
        variants = {
            f"{stream} {method}@{rate:g}": {"method": method, "lr": rate} | sizes
            for method, rate in asked
        }
        found = runs(module.job, variants, [SEED])
        for (method, rate), figures in zip(asked, found.values(), strict=True):
            table[method][rate] = means(stream, figures)
        asked = [] if quick else neighbours(stream, table)
    return table


def means(stream: str, found: list[dict[str, Any]]) -> dict[str, float]:
    scores = (losses if stream == "trace" else accuracies)(found)
    return {name: spread["mean"] for name, spread in scores.items()}


def best(stream: str, scores: dict[float, dict[str, float]]) -> float:
    """The rate of the lowest loss, or of the highest accuracy on all digits."""
    key, sign = ("loss", -1) if stream == "trace" else ("last", 1)
    return max(scores, key=lambda rate: sign * scores[rate][key])


def neighbours(stream: str, table: Table) -> list[tuple[str, float]]:
    """Rates beside the best of each method that were not tried."""
    asked = []
    for method, scores in table.items():
        at = RATES.index(best(stream, scores))
        beside = [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES)]
        asked += [(method, rate) for rate in beside if rate not in scores]
    return asked


def longer(rates: dict[str, float], table: Table) -> dict[int, dict[str, dict[str, float]]]:
    """Scores of the two upper bounds on the digits by epochs, which are doubled until the mean
    score is better by less than 0.02: short of training, they bound nothing."""
    by_epochs = {EPOCHS: {m: table[m][rates[m]] for m in BOUNDS}}
    for n in (2 * EPOCHS, 4 * EPOCHS):
        variants = {
            f"digits {m}, {n} epochs": {"method": m, "lr": rates[m]} | DIGITS | {"epochs": n}
            for m in BOUNDS
        }
        found = runs(split_digits.job, variants, [SEED])
        scores = [means("digits", f) for f in found.values()]
        by_epochs[n] = dict(zip(BOUNDS, scores, strict=True))
        if last(by_epochs[n]) - last(by_epochs[n // 2]) < 0.02:
            break
    return by_epochs


def last(scores: dict[str, dict[str, float]]) -> float:
    return mean(s["last"] for s in scores.values())


def enough(by_epochs: dict[int, dict[str, dict[str, float]]]) -> int:
    """The fewest epochs that twice as many better by less than 0.02, or the most tried."""
    tried = sorted(by_epochs)
    if len(tried) > 1 and last(by_epochs[tried[-1]]) - last(by_epochs[tried[-2]]) < 0.02:
        return tried[-2]
    return tried[-1]


def pools(rate: float, quick: bool) -> dict[int, dict[str, float]]:
    """Scores of PMoE on the digits by the cells that the image router reads."""
    sizes = DIGITS | (FEW["digits"] if quick else {})
    chosen = POOLS[: 2 if quick else None]
    variants = {
        f"digits pool {p}": {"method": "pmoe", "lr": rate, "router": {"pool": p}} | sizes
        for p in chosen
    }
    found = runs(split_digits.job, variants, [SEED])
    return {p: means("digits", f) for p, f in zip(chosen, found.values(), strict=True)}


def main() -> None:
    quick = arguments(__doc__ or "").quick
    methods = {"digits": split_digits.METHODS}
    tables, chosen = {}, {}
    for stream, names in methods.items():
        trained = [m for m in names if m != "ranpac"]  # which is solved
        tables[stream] = search(stream, trained[:1] if quick else trained, quick)
        chosen[stream] = {"rates": {m: best(stream, s) for m, s in tables[stream].items()}}
    rates = chosen["digits"]["rates"]
    by_epochs = {} if quick else longer(rates, tables["digits"])
    epochs = EPOCHS if quick else enough(by_epochs)
    by_pool = pools(rates["pmoe"], quick)
    pool = max(by_pool, key=lambda p: by_pool[p]["last"])
    chosen["digits"] |= {"epochs": epochs, "pool": pool}
    figures = {s: {"chosen": chosen[s], "table": tables[s]} for s in methods}
    figures["digits"] |= {"sizes": DIGITS, "epochs": by_epochs, "pools": by_pool}
    if not quick:
        text = json.dumps(machine() | {"seed": SEED} | figures, indent=1)
        (RESULTS / "tuning.json").write_text(text + "\n")
    rows = [
        (s, method, f"{rate:g}", *(f"{v:.3f}" for v in list(scores.values())[:3]),
         "best" if rate == chosen[s]["rates"][method] else "")
        for s, table in tables.items()
        for method, by_rate in table.items()
        for rate, scores in by_rate.items()
    ]  # fmt: skip
    rows += [
        ("digits", f"pmoe, pool {p}", "", *(f"{v:.3f}" for v in list(scores.values())[:3]),
         "best" if p == pool else "")
        for p, scores in by_pool.items()
    ]  # fmt: skip
    rows += [
        ("digits", f"{method}, {n} epochs", "", *(f"{v:.3f}" for v in list(scores.values())[:3]),
         "enough" if n == epochs else "")
        for n, both in by_epochs.items()
        for method, scores in both.items()
    ]  # fmt: skip
    columns = ["stream", "method", "rate", "loss or last", "BWT", "base", ""]
    finish("tuning", columns, rows, chosen=chosen)


if __name__ == "__main__":
    main()
