"""Learning rates of every method over a stream, and the image router's `pool`, on held-out items.

``python -m benchmarks.tuning [--quick]``: few items of TRACE (scored on its eval items) and of
MNIST (scored on training images that no method is given), under a seed that no other benchmark
uses. What is best by the score after all tasks is what `benchmarks.trace` and
`benchmarks.split_digits` run with.
"""

from __future__ import annotations

import json
from typing import Any

from . import split_digits, trace
from .common import arguments, finish, machine
from .streams import RESULTS, accuracies, losses, runs

SEED = 100  # of no other benchmark
RATES = {"trace": (1e-3, 3e-3, 1e-2, 3e-2), "digits": (3e-3, 1e-2, 3e-2, 1e-1)}
BEYOND = {"pmoe-gradient": (1e-1,)}  # on TRACE the best was at the edge
EPOCHS, POOLS = 10, (1, 2, 4, 8)
TRACE = {"items": 80, "tested": 12, "tasks": 8, "epochs": 2, "part": "eval"}
DIGITS = {"train": 200, "tested": 500, "base_tested": 200, "tasks": 5, "part": "eval"}
FEW = {"trace": {"items": 16, "tested": 4, "tasks": 1, "epochs": 1}, "digits": {
    "train": 32, "tested": 40, "base_tested": 20, "tasks": 2}}  # fmt: skip


def search(stream: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Scores of every method at every rate."""
    module: Any = trace if stream == "trace" else split_digits
    sizes = (TRACE if stream == "trace" else DIGITS) | (FEW[stream] if quick else {})
    if stream == "digits":
        sizes |= {"epochs": 1 if quick else EPOCHS}
    variants = {}
    for method in ("lora",) if quick else module.METHODS:
        beyond = BEYOND.get(method, ()) if stream == "trace" else ()
        for rate in (*RATES[stream][: 2 if quick else None], *beyond):
            if method != "ranpac":  # solved, not trained
                variants[f"{method}@{rate:g}"] = {"method": method, "lr": rate} | sizes
    found = runs(module.job, {f"{stream} {k}": v for k, v in variants.items()}, [SEED])
    scored = losses if stream == "trace" else accuracies
    table: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        means = {k: v["mean"] for k, v in scored(found[f"{stream} {name}"]).items()}
        table.setdefault(variant["method"], {})[f"{variant['lr']:g}"] = means
    return table


def pools(rate: float, quick: bool) -> dict[str, dict[str, float]]:
    """Scores of PMoE on the digits by the cells that the image router reads."""
    sizes = DIGITS | {"epochs": EPOCHS} | (FEW["digits"] | {"epochs": 1} if quick else {})
    variants = {
        f"pool {p}": {"method": "pmoe", "lr": rate, "router": {"pool": p}} | sizes
        for p in POOLS[: 2 if quick else None]
    }
    found = runs(split_digits.job, variants, [SEED])
    return {n: {k: v["mean"] for k, v in accuracies(f).items()} for n, f in found.items()}


def best(table: dict[str, dict[str, Any]], key: str, sign: int) -> dict[str, float]:
    return {
        method: float(max(scores, key=lambda rate: sign * scores[rate][key]))
        for method, scores in table.items()
    }


def main() -> None:
    quick = arguments(__doc__ or "").quick
    on_trace, on_digits = (search(stream, quick) for stream in ("trace", "digits"))
    rates = {"trace": best(on_trace, "loss", -1), "digits": best(on_digits, "last", 1)}
    by_pool = pools(rates["digits"].get("pmoe", 1e-2), quick)
    pool = max(by_pool, key=lambda name: by_pool[name]["last"])
    figures = {
        "trace": {"chosen": {"rates": rates["trace"]}, "sizes": TRACE, "table": on_trace},
        "digits": {
            "chosen": {"rates": rates["digits"], "epochs": EPOCHS, "pool": int(pool.split()[1])},
            "sizes": DIGITS, "table": on_digits, "pools": by_pool,
        },
    }  # fmt: skip
    if not quick:
        text = json.dumps(machine() | {"seed": SEED} | figures, indent=1)
        (RESULTS / "tuning.json").write_text(text + "\n")
    rows = [
        (stream, method, rate, f"{scores[key]:.3f}", f"{scores['bwt']:.3f}",
         f"{scores['base']:.3f}", "best" if float(rate) == rates[stream][method] else "")
        for stream, table, key in (("trace", on_trace, "loss"), ("digits", on_digits, "last"))
        for method, by_rate in table.items()
        for rate, scores in by_rate.items()
    ]  # fmt: skip
    rows += [("digits", n, "", *(f"{s[k]:.3f}" for k in ("last", "bwt", "base")),
              "best" if n == pool else "") for n, s in by_pool.items()]  # fmt: skip
    columns = ["stream", "method", "rate", "loss or last", "BWT", "base", ""]
    finish("tuning", columns, rows, chosen={k: v["chosen"] for k, v in figures.items()})


if __name__ == "__main__":
    main()
