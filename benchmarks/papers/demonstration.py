"""The demonstrations over seeds, by every method that they compare: digits, or short texts."""

# python -m benchmarks.papers.demonstration [--kind digits|language] [--quick]: what `moe-rewrite demo`
# computes, with five seeds (of the split of the images or the texts, the network, the methods); one
# process a seed, one thread each, since the order of sums, and so accuracies, differ with the number
# of threads.

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.plots import subplots
from ..tools.report import finish, parser, save

SEEDS = (0, 1, 2, 3, 4)
KINDS = {  # the score at the end of the new tasks, what both are called, epochs, quick ones, the file
    "digits": ("avg", "new digits", "digits 0-5", 40, 2, "demonstration"),
    "language": ("op", "new kinds of text", "stories", 12, 1, "demonstration_language"),
}


def one_seed(kind: str, seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    """The figures of each method."""
    import torch

    from moe_rewrite.demo.digits import digits
    from moe_rewrite.demo.language import language

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"digits": digits, "language": language}[kind](Path(folder), seed, epochs)
    names = (KINDS[kind][0], "bwt", "base_after", "base_before", "R", "seconds")
    return {method: {n: r.figures()[n] for n in names} for method, r in found.items()}


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def draw(of_method: dict[str, dict[str, list[float]]], titles: dict[str, str], low: float) -> Any:
    """Every seed a point: what the network knew, and what it learnt, at the end."""
    figure, axis = subplots(1, 1, (5, 4))
    score = next(iter(titles))
    for method, of in of_method.items():
        axis.scatter(of["base_after"], of[score], label=method)
    axis.set(
        xlabel=titles["base_after"], ylabel=titles[score], xlim=(-0.03, 1.03), ylim=(low, 1.03)
    )
    axis.legend()
    return figure


def main() -> None:
    if answer(one_seed):
        return
    made = parser(__doc__)
    made.add_argument("--kind", choices=KINDS, default="digits")
    given = made.parse_args()
    score, new, known, whole, few, file = KINDS[given.kind]
    titles = {score: f"{new} at the end", "bwt": "BWT", "base_after": f"{known} at the end"}
    seeds, epochs = (SEEDS[:1], few) if given.quick else (SEEDS, whole)
    runs = [in_fresh_process(one_seed, given.kind, seed, epochs) for seed in seeds]
    of_method = {
        method: {name: [run[method][name] for run in runs] for name in (*titles, "base_before")}
        for method in runs[0]
    }
    if not given.quick:
        low = 0.3 if given.kind == "digits" else -0.03
        save(file, {"seeds": seeds, "runs": runs}, draw(of_method, titles, low))
    rows = [
        (method, *(spread(of[name]) for name in titles), spread(of["base_before"]))
        for method, of in of_method.items()
    ]
    columns = ["method", *titles.values(), f"{known} before"]
    finish(file, columns, rows, seeds=seeds, figures=of_method)


if __name__ == "__main__":
    main()
