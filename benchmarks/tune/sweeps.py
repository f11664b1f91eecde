"""What the options of PMoE are worth on TRACE: one at a time, round what the library does by itself.

``python -m benchmarks.sweeps [--quick]``: stories260K, few items a task, scored on the eval items
and not on the test items, several seeds. The depth of the split, what the gate reads, and experts
kept a row of the analytic router; replay and the loss on task identity of the one by gradient.
"""

from __future__ import annotations

from typing import Any

from . import trace
from .common import arguments, finish, save
from .streams import facts, losses, runs, spread

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
    """By method, the job's options by the name of what differs from the defaults."""
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


def draw(results: dict[str, dict[str, Any]]) -> Any:
    """A row of panels a method, a panel a score, a bar a variant; the default's value as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tallest = max(len(r) for r in results.values())
    size = (1 + 4.2 * len(TITLES), len(results) * (1.2 + 0.25 * tallest))
    figure, grid = plt.subplots(len(results), len(TITLES), figsize=size, squeeze=False)
    for axes, (method, found) in zip(grid, results.items(), strict=True):
        for axis, (key, title) in zip(axes, TITLES.items(), strict=True):
            means, spreads = ([r[key][k] for r in found.values()] for k in ("mean", "spread"))
            axis.barh(list(found), means, xerr=spreads, capsize=2)
            axis.axvline(found["default"][key]["mean"], color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.set_title(f"{method}: {title}", fontsize=9)
    figure.tight_layout()
    return figure


def main() -> None:
    quick = arguments(__doc__ or "").quick
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
        save("sweeps", figures, draw(results))
    keys = ("loss", "over default", "bwt", "base")
    rows = [
        (method, name, *(f"{r[k]['mean']:.3f} ± {r[k]['spread']:.3f}" for k in keys))
        for method, named in results.items()
        for name, r in named.items()
    ]
    columns = ["method", "what differs", "mean loss", "over default", "BWT", "own stories"]
    finish("sweeps", columns, rows, methods=results)


if __name__ == "__main__":
    main()
