"""Results of a method on a stream: figures, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import require_package
from ..utils.atomic_files import write_figure, write_json
from ..utils.text_tables import count, table
from .matrix import ScoreMatrix


@dataclass
class Result:
    """Scores of one method; higher is better.

    tasks: their names, in order.
    score: kind of score, like ``"accuracy"``.
    before: score of every task before the first was learnt.
    base: score of the base task before the first task and after each; None without a base task.
    R: R[i][j] is the score of task j after learning task i.
    seconds: time spent.
    trainable: parameters trained for the last task.
    total: all parameters.
    keeps_data: the method stores samples of older tasks.
    router_use: [j]: mean gates on task j, the frozen model's first; None without a router.
    router_history: [i]: `router_use` after learning task i; empty without a router.
    other: kind -> other scores after the last task: of every task, then of the base task.
    """

    tasks: list[str]
    score: str
    before: list[float]
    base: list[float | None]
    R: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    trainable: int = 0
    total: int = 0
    keeps_data: bool = False
    router_use: list[list[float]] | None = None
    router_history: list[list[list[float]]] = field(default_factory=list)
    other: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def matrix(self) -> ScoreMatrix:
        return ScoreMatrix(tuple(self.tasks), tuple(map(tuple, self.R)), tuple(self.before))

    def figures(self) -> dict[str, Any]:
        """The form of ``--json``."""
        matrix = self.matrix
        return {
            "tasks": self.tasks, "R": self.R, "op": matrix.overall(),
            "bwt": matrix.backward_transfer, "fwt": matrix.forward_transfer,
            "forgetting": matrix.forgetting, "avg": matrix.average, "base_before": self.base[0],
            "base_after": self.base[-1], "trainable": self.trainable, "total": self.total,
            "seconds": self.seconds, "score": self.score, "keeps_data": self.keeps_data,
            "before": self.before, "base": self.base, "router_use": self.router_use,
            "other": self.other,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def comparison_table(results: Mapping[str, Result]) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = []
    for name, result in results.items():
        f = result.figures()
        rows.append((
            name, shown(f["op"]), shown(f["bwt"]), shown(f["forgetting"]), shown(f["fwt"]),
            f"{shown(f['base_before'])} -> {shown(f['base_after'])}", count(f["trainable"]),
            "yes" if f["keeps_data"] else "no", f"{f['seconds']:.0f} s",
        ))  # fmt: skip
    columns = ["method", "OP", "BWT", "forgot", "FWT", "base", "trained", "keeps data", "time"]
    score = next(iter(results.values())).score
    return table(columns, rows, f"score: {score}, higher is better")


def matrix_table(name: str, result: Result) -> str:
    rows = [
        (task, *(f"{v:.3f}" for v in row))
        for task, row in zip(result.tasks, result.R, strict=False)
    ]
    return table([f"{name}: after", *result.tasks], rows)


def write_results(
    results: Mapping[str, Result], folder: Path | None, json_file: Path | None
) -> None:
    """Write results.json and pictures into a folder; each file is replaced atomically."""
    figures = {name: result.figures() for name, result in results.items()}
    if json_file is not None:
        write_json(json_file, figures)
    if folder is None:
        return
    write_json(folder / "results.json", figures)
    _draw_matrices(results, folder / "matrices.png")
    _draw_curves(results, folder / "curves.png")
    for name, result in results.items():
        if result.router_use is not None:
            _draw_router(result, folder / f"router-{name}.png")


def _pyplot() -> Any:
    require_package("matplotlib", "continual", "a folder of results")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _heat_map(
    axis: Any, values: Sequence[Sequence[float]], rows: list[str], columns: list[str]
) -> Any:
    image = axis.imshow(values, cmap="viridis")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    low, high = image.get_clim()
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = value < (low + high) / 2
            colour = "white" if dark else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return image


def _draw_matrices(results: Mapping[str, Result], path: Path) -> None:
    figure, axes = _pyplot().subplots(
        1, len(results), figsize=(1.5 + 4 * len(results), 4), squeeze=False
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        done = result.tasks[: len(result.R)]
        _heat_map(axis, result.R, done, result.tasks)
        axis.set_title(name, fontsize=9)
    axes[0][0].set_ylabel("after learning")
    figure.tight_layout()
    write_figure(path, figure)


def _draw_curves(results: Mapping[str, Result], path: Path) -> None:
    """Draw the mean score of the tasks learnt, and the base task's score, after each task."""
    pyplot = _pyplot()
    figure, (learnt, base) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, result in results.items():
        matrix = result.matrix
        learnt.plot([matrix.overall(t) for t in range(matrix.learnt)], marker="o", label=name)
        if None not in result.base:
            base.plot(result.base, marker="o", label=name)
    learnt.set(title=f"OP: mean {result.score} on the tasks learnt", xlabel="task")
    base.set(title=f"base task: {result.score}", xlabel="tasks learnt")
    learnt.legend(fontsize=7)
    figure.tight_layout()
    write_figure(path, figure)


def _draw_router(result: Result, path: Path) -> None:
    assert result.router_use is not None
    experts = [f"expert {i}" for i in range(len(result.router_use[0]) - 1)]
    figure, axis = _pyplot().subplots(
        figsize=(1.5 + 0.6 * len(experts), 1 + 0.5 * len(result.tasks))
    )
    _heat_map(axis, result.router_use, result.tasks, ["frozen", *experts])
    axis.set_title("mean gate by task", fontsize=9)
    figure.tight_layout()
    write_figure(path, figure)
