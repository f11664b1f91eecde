"""What the options of PMoE are worth on TRACE: one at a time, round what the library does by itself.

``python -m benchmarks.sweeps [--quick]``: stories260K, few items a task, scored on the eval items
and not on the test items, several seeds. The depth of the split, what the gate reads, and experts
kept a row for both fits of the router; replay and the loss on task identity for the one by
gradient.
"""

from __future__ import annotations

from typing import Any

from . import trace
from .common import arguments, finish, save
from .streams import facts, losses, runs, spread

SIZES = {"items": 48, "tested": 16, "tasks": 4, "epochs": 3, "part": "eval"}
FEW = {"items": 16, "tested": 4, "tasks": 2, "epochs": 1, "part": "eval"}
BOTH: dict[str, dict[str, dict[str, Any]]] = {
    "split": {f"split={k}": {"split": k} for k in (1, 2, 4)},
    "gate": {"token": {"granularity": "token"}},  # a causal model cannot read the whole sequence
    "top_k": {f"top_k={k}": {"top_k": k} for k in (1, 2)},
}
GRADIENT: dict[str, dict[str, dict[str, Any]]] = {
    "replay": {f"replay={r:g}": {"replay": r} for r in (0.0, 0.1, 0.2)},
    "router loss": {
        f"router_loss={w:g}": {"learner": {"router_loss": w}} for w in (0.0, 0.1, 10.0)
    },
}
FACTORS = {"pmoe": BOTH, "pmoe-gradient": GRADIENT | BOTH}
TITLES = {"loss": "mean loss after all tasks", "bwt": "BWT, nats", "base": "loss on own stories"}


def variants(quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """By method, the job's options by the name of what differs from the defaults."""
    sizes = FEW if quick else SIZES
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for method, factors in FACTORS.items():
        fixed = {"method": method, "lr": trace.RATES[method]} | sizes
        made[method] = {"default": fixed}
        for values in factors.values():
            for name, options in list(values.items())[: 1 if quick else None]:
                made[method][name] = fixed | options
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
    seeds = (0,) if quick else (0, 1, 2)
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
