"""The demonstration over seeds: handwritten digits, by every method that it compares."""

# python -m benchmarks.papers.demonstration [--quick]: what `moe-rewrite demo` computes, with five
# seeds (of the split of the images, the network, the methods); one process a seed, one thread each,
# since the order of sums, and so accuracies, differ with the number of threads.

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save

SEEDS = (0, 1, 2, 3, 4)
FIGURES = {"avg": "new digits at the end", "bwt": "BWT", "base_after": "digits 0-5 at the end"}


def one_seed(seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    """The figures of each method."""
    import torch

    from moe_rewrite.demo.digits import digits

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = digits(Path(folder), seed, epochs)
    names = (*FIGURES, "base_before", "R", "seconds")
    return {method: {n: r.figures()[n] for n in names} for method, r in found.items()}


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def draw(of_method: dict[str, dict[str, list[float]]]) -> Any:
    """Every seed a point: the old digits and the new ones at the end."""
    figure, axis = subplots(1, 1, (5, 4))
    for method, of in of_method.items():
        axis.scatter(of["base_after"], of["avg"], label=method)
    axis.set(
        xlabel=FIGURES["base_after"], ylabel=FIGURES["avg"], xlim=(-0.03, 1.03), ylim=(0.3, 1.03)
    )
    axis.legend()
    return figure


def main() -> None:
    if answer(one_seed):
        return
    quick = is_quick(__doc__)
    seeds, epochs = (SEEDS[:1], 2) if quick else (SEEDS, 40)
    runs = [in_fresh_process(one_seed, seed, epochs) for seed in seeds]
    of_method = {
        method: {name: [run[method][name] for run in runs] for name in (*FIGURES, "base_before")}
        for method in runs[0]
    }
    if not quick:
        save("demonstration", {"seeds": seeds, "runs": runs}, draw(of_method))
    rows = [
        (method, *(spread(of[name]) for name in FIGURES), spread(of["base_before"]))
        for method, of in of_method.items()
    ]
    columns = ["method", *FIGURES.values(), "digits 0-5 before"]
    finish("demonstration", columns, rows, seeds=seeds, figures=of_method)


if __name__ == "__main__":
    main()
