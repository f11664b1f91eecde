"""The earliest split at which tasks are told apart about as well as anywhere."""

import pytest

from moe_rewrite.ir.split_curve import MARGIN, SplitCurve, SplitPoint


def curve(*accuracies, error=0.0, problems=()):
    points = [
        SplitPoint(i, f"layers.{i}", 1 - i / 10, a, error, "no" if i in problems else "")
        for i, a in enumerate(accuracies)
    ]
    return SplitCurve((("a", 8), ("b", 9)), tuple(points))


@pytest.mark.parametrize(
    ("accuracies", "error", "split"),
    [
        ((0.9, 0.9, 0.9), 0.0, 0),
        ((0.5, 0.8, 0.9), 0.0, 2),
        ((0.5, 0.896, 0.9, 0.9), 0.0, 1),  # within half a point
        ((0.5, 0.894, 0.9, 0.8), 0.0, 2),
        ((0.5, 0.87, 0.9, 0.89), 0.04, 1),  # within one standard error
        ((0.5, 0.85, 0.9, 0.89), 0.04, 2),
        ((0.7,), 0.1, 0),
    ],
)
def test_the_rule(accuracies, error, split):
    assert MARGIN == 0.005
    assert curve(*accuracies, error=error).split == split


def test_the_error_that_counts_is_that_of_the_best():
    points = [SplitPoint(0, "x", 1.0, 0.80, 0.30), SplitPoint(1, "y", 0.5, 0.9, 0.01)]
    assert SplitCurve((), tuple(points)).split == 1


def test_splits_that_are_not_possible_are_passed_over_and_shown():
    found = curve(1.0, 0.9, 0.9, problems={0})
    assert found.split == 1
    rows = str(found).splitlines()
    assert any("no" in row and "layers.0" in row for row in rows)
    assert any("1 (chosen)" in row and "90.0% ± 0.0" in row for row in rows)
    assert "a (8), b (9)" in " ".join(rows) and "layers.1" in found._repr_html_()
