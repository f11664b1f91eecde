"""How well tasks are told apart at each possible cut, and the split that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.html_tables import bar, html_table
from ..utils.text_tables import table

MARGIN = 0.005
COLUMNS = ["split", "block", "tasks told apart", "parameters after it"]


@dataclass(frozen=True)
class SplitPoint:
    """A split at the beginning of a block.

    index, label: of the first deep block.
    after: share of the model's parameters that lie after the cut.
    accuracy: share of held-out rows that a router here sends to their own task, the mean over tasks;
        0 where nothing was measured.
    error: standard error of the accuracy.
    problem: why nothing was measured: the model cannot be split here; else empty.
    """

    index: int
    label: str
    after: float
    accuracy: float = 0.0
    error: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class SplitCurve:
    """What ``split="auto"`` measured. ``print(curve)`` shows it as a table.

    tasks: (name, number of calibration samples) of each.
    points: every split at a block, from the first on; one of them without a problem at least.
    """

    tasks: tuple[tuple[str, int], ...]
    points: tuple[SplitPoint, ...]

    @property
    def chosen(self) -> SplitPoint:
        """The earliest split at which tasks are told apart about as well as anywhere: its accuracy is
        at most one standard error of the best below the best, or half a point where that is more.

        Earlier, since what lies after the cut is what experts can adapt. One standard error is the
        rule by which trees are pruned (Breiman et al. 1984, section 3.4.3): what is less cannot be
        told from chance by these samples. Half a point, since a row that goes astray costs at most
        its own score.
        """
        known = [p for p in self.points if not p.problem]
        best = max(known, key=lambda p: p.accuracy)
        enough = best.accuracy - max(MARGIN, best.error)
        return next(p for p in known if p.accuracy >= enough)

    @property
    def split(self) -> int:
        """Index of the first deep block, as `convert` takes it."""
        return self.chosen.index

    def __str__(self) -> str:
        measured = [
            (*self._start(p), self._accuracy(p), f"{100 * p.after:.1f}%") for p in self.points
        ]
        return table(COLUMNS, measured, self.title)

    def _repr_html_(self) -> str:
        """For notebooks: the table, without script."""
        rows = [(*self._start(p), p.problem or bar(p.accuracy), bar(p.after)) for p in self.points]
        return html_table(COLUMNS, rows, self.title)

    @property
    def title(self) -> str:
        names = ", ".join(f"{name} ({samples})" for name, samples in self.tasks)
        return (
            f'split="auto" is {self.split}: the first at which a router in closed form tells held-out '
            f"samples of these tasks apart as well as anywhere: {names}; by chance "
            f"{100 / len(self.tasks):.1f}%"
        )

    def _start(self, point: SplitPoint) -> tuple[str, str]:
        mark = " (chosen)" if point is self.chosen else ""
        return f"{point.index}{mark}", point.label

    def _accuracy(self, point: SplitPoint) -> str:
        if point.problem:
            return point.problem
        return f"{100 * point.accuracy:.1f}% ± {100 * point.error:.1f}"
