"""The effect of PMoE's options on TRACE, changed one at a time from the defaults."""

# python -m benchmarks.tune.sweeps [--quick]: stories260K, few items a task, scored on the eval items
# and not on the test items, several seeds. The depth of the split, what the gate reads, and experts
# kept a row of the analytic router; replay and the loss on task identity of the one by gradient.

from __future__ import annotations

from typing import Any

from ..papers import trace
from ..papers.streams import facts, losses, runs, spread
from ..tools.plots import bars
from ..tools.report import finish, is_quick, mean_and_spread, save

SEEDS = (0, 1, 2)
SIZES = {"items": 48, "tested": 12, "tasks": 3, "epochs": 2, "part": "eval"}
FEW = {"items": 16, "tested": 4, "tasks": 2, "epochs": 1, "part": "eval"}
# a causal model cannot read the whole sequence, so a gate reads the prefix or the token
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "pmoe": {
        "split=1": {"split": 1}, "split=2": {"split": 2}, "split=4": {"split": 4},
        "token gate": {"granularity": "token"}, "top_k=1": {"top_k": 1}, "top_k=2": {"top_k": 2},
    },
    "pmoe-gradient": {
        "replay=0": {"replay": 0.0}, "replay=0.05": {"replay": 0.05},
        "router_loss=0": {"learner": {"router_loss": 0.0}},
        "router_loss=10": {"learner": {"router_loss": 10.0}},
    },
}  # fmt: skip
TITLES = {"loss": "mean loss after all tasks", "bwt": "BWT, nats", "base": "loss on own stories"}


def variants(quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Method -> name of the variant -> the job's options that differ from the defaults."""
    sizes = FEW if quick else SIZES
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for method, differing in list(FACTORS.items())[: 1 if quick else None]:
        fixed = {"method": method, "lr": trace.RATES[method]} | sizes
        chosen = list(differing.items())[: 1 if quick else None]
        made[method] = {"default": fixed} | {name: fixed | options for name, options in chosen}
    return made


def compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Scores of each variant, and by how much its loss is over the default's, seed by seed."""
    default = [-r["op"] for r in found["default"]]
    return {
        name: losses(figures)
        | {"over default": spread([-r["op"] - d for r, d in zip(figures, default, strict=True)])}
        | {k: v for k, v in facts(figures).items() if k in ("trainable", "seconds")}
        for name, figures in found.items()
    }


def main() -> None:
    quick = is_quick(__doc__)
    seeds = SEEDS[:1] if quick else SEEDS
    asked = variants(quick)
    flat = {f"{m} {n}": options for m, named in asked.items() for n, options in named.items()}
    found = runs(trace.job, flat, seeds)
    results = {
        method: compared({name: found[f"{method} {name}"] for name in named})
        for method, named in asked.items()
    }
    if not quick:
        figures = {"seeds": len(seeds), "sizes": SIZES, "methods": results}
        save("sweeps", figures, bars(results, TITLES, line="default"))
    keys = ("loss", "over default", "bwt", "base")
    rows = [
        (method, name, *(mean_and_spread(r[k]) for k in keys))
        for method, named in results.items()
        for name, r in named.items()
    ]
    columns = ["method", "what differs", "mean loss", "over default", "BWT", "own stories"]
    finish("sweeps", columns, rows, methods=results)


if __name__ == "__main__":
    main()
