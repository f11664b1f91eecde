"""The figures of a score matrix, by hand and by their laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual.matrix import ScoreMatrix

NAMES = ("a", "b", "c")
ROWS = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.6, 0.7]]


def test_three_tasks_by_hand():
    matrix = ScoreMatrix(NAMES, ROWS, before=(0.1, 0.1, 0.2))
    assert matrix.overall(0) == pytest.approx(0.9)
    assert matrix.overall(1) == pytest.approx((0.7 + 0.8) / 2)
    assert matrix.overall() == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert matrix.average == pytest.approx((0.9 + 0.75 + 0.7) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    assert ScoreMatrix(NAMES, ROWS).forward_transfer is None


def test_a_stream_that_has_only_begun():
    matrix = ScoreMatrix(NAMES, ROWS[:1])
    assert matrix.learnt == 1 and matrix.overall() == 0.9 == matrix.average
    assert matrix.backward_transfer == 0 == matrix.forgetting


scores = st.floats(0, 1, allow_nan=False)
squares = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(scores, min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(rows=squares)
def test_forgetting_is_at_least_the_loss_and_never_a_gain(rows):
    matrix = ScoreMatrix(tuple(map(str, range(len(rows)))), rows)
    assert matrix.forgetting >= -1e-12
    assert matrix.forgetting >= -matrix.backward_transfer - 1e-12
    kept = ScoreMatrix(matrix.tasks, [rows[0]] * len(rows))
    assert kept.forgetting == 0 == kept.backward_transfer


@pytest.mark.parametrize("rows", [[], [*ROWS, ROWS[0]], [[0.1, 0.2]], [ROWS[0], [0.5]]])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(MoeRewriteError, match="expected"):
        ScoreMatrix(NAMES, rows)
