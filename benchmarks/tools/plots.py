"""Plots of results, without a display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Any]]


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """matplotlib's own: (figure, one axis or an array of them)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, **options)


def curves(results: Results, labels: Mapping[str, str], title: str) -> Any:
    """Test accuracy by number of training images, mean and spread over seeds."""
    figure, axis = subplots(1, 1, (6, 4))
    for name, label in labels.items():
        by_size = results[name]["by_size"]
        means, spreads = ([r[k] for r in by_size.values()] for k in ("mean", "spread"))
        axis.errorbar([int(n) for n in by_size], means, spreads, marker="o", capsize=3, label=label)
    axis.set(xlabel="training images", ylabel="test accuracy", title=title)
    axis.legend(fontsize=8)
    return figure


def bars(groups: Mapping[str, Results], titles: Mapping[str, str], line: str = "") -> Any:
    """A row of panels a group, a panel a score, a bar a result; line: the result whose value is
    drawn through the others."""
    tallest = max(len(results) for results in groups.values())
    height = max(4.0, len(groups) * (1.0 + 0.25 * tallest))
    figure, grid = subplots(
        len(groups), len(titles), (1 + 4.2 * len(titles), height), squeeze=False
    )
    for axes, (group, results) in zip(grid, groups.items(), strict=True):
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            means, spreads = ([r[key][k] for r in results.values()] for k in ("mean", "spread"))
            axis.barh(list(results), means, xerr=spreads, capsize=2)
            if line:
                axis.axvline(results[line][key]["mean"], color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.set_title(f"{group}: {title}" if group else title, fontsize=9 if group else None)
    return figure
