"""Layouts of gates, and the views of a plan, compared with their definitions in plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rewrite.ir.gate_layout import Flat, Gathered, Line, OverMap, Rows, Samples, Swapped
from moe_rewrite.routing.plan import RoutingPlan
from moe_rewrite.routing.plan_views import (
    ClassGates,
    ScaledGates,
    SortedGates,
    WholePlan,
    view_plan,
)

SIZE = st.integers(1, 4)
some = settings(max_examples=25, deadline=None)


def gates_of(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def over(shaped, *lead):
    """Gates as they broadcast over rows of these leading dimensions."""
    assert shaped.ndim == len(lead) + 1
    return shaped.expand(*lead, shaped.shape[-1])


def each(*sizes):
    return itertools.product(*map(range, sizes))


@some
@given(SIZE, SIZE, SIZE, st.lists(SIZE, max_size=2), st.booleans())
def test_rows_of_a_sequence(batch, length, count, middle, one_for_all):
    """For any number of dimensions between a row and its features."""
    gates = gates_of(batch, 1 if one_for_all else length, count)
    shaped = Rows(3 + len(middle)).broadcast(gates, (batch, length), 0)
    for b, s, *rest in each(batch, length, *middle):
        row = over(shaped, batch, length, *middle)[(b, s, *rest)]
        assert torch.equal(row, gates[b, 0 if one_for_all else s])


@some
@given(SIZE, SIZE, st.lists(SIZE, max_size=3), st.booleans())
def test_samples(batch, count, middle, as_sequence):
    """Every row of a sample has its one row of gates."""
    gates = gates_of(batch, count)
    given_ = gates.unsqueeze(1) if as_sequence else gates
    shaped = Samples(2 + len(middle)).broadcast(given_, (batch,), 0)
    for b, *rest in each(batch, *middle):
        assert torch.equal(over(shaped, batch, *middle)[(b, *rest)], gates[b])


@some
@given(SIZE, SIZE, SIZE, st.lists(SIZE, max_size=2), st.booleans())
def test_rows_with_the_length_first(batch, length, count, middle, one_for_all):
    gates = gates_of(batch, 1 if one_for_all else length, count)
    shaped = Swapped(3 + len(middle)).broadcast(gates, (batch, length), 0)
    for s, b, *rest in each(length, batch, *middle):
        row = over(shaped, length, batch, *middle)[(s, b, *rest)]
        assert torch.equal(row, gates[b, 0 if one_for_all else s])


@some
@given(SIZE, SIZE, st.integers(0, 4), st.booleans(), st.booleans())
def test_rows_in_one_dimension(batch, length, count, swapped, one_for_all):
    gates = gates_of(batch, 1 if one_for_all else length, count)
    shaped = Flat(swapped).broadcast(gates, (batch, length), 0)
    assert shaped.shape == (batch * length, count)
    for b, s in each(batch, length):
        row = s * batch + b if swapped else b * length + s
        assert torch.equal(shaped[row], gates[b, 0 if one_for_all else s])


@pytest.mark.parametrize("layout", [Flat(False), Flat(True), OverMap(False, None)], ids=str)
def test_no_samples_at_all(layout):
    assert layout.broadcast(gates_of(0, 3, 2), (0, 3), 0).numel() == 0


@some
@given(SIZE, SIZE, SIZE, SIZE, st.booleans(), st.booleans())
def test_one_row_of_gates_for_a_map(batch, count, height, width, channels_last, as_sequence):
    gates = gates_of(batch, count)
    given_ = gates.unsqueeze(1) if as_sequence else gates
    shaped = OverMap(channels_last, None).broadcast(given_, (batch,), 0)
    shaped = shaped if channels_last else shaped.permute(0, 2, 3, 1)
    for b, y, x in each(batch, height, width):
        assert torch.equal(over(shaped, batch, height, width)[b, y, x], gates[b])


def patches_at(position, length, grid):
    """The patches of an axis that cover a position. On an axis shorter than the grid, patches are
    narrower than positions: all that overlap it."""
    found = []
    for i in range(grid):
        low, high = i * length / grid, (i + 1) * length / grid
        if length >= grid:
            low, high = math.floor(low), math.floor(high)
        if low < position + 1 and high > position:
            found.append(i)
    return found


@some
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 11),
    st.integers(1, 11), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_patches_over_a_map(batch, count, grid, height, width, prefix, channels_last):
    """A position has its patch's gates, or the mean over patches that overlap it; prefix tokens are
    not on the map."""
    gates = gates_of(batch, prefix + grid * grid, count)
    shaped = OverMap(channels_last, (height, width)).broadcast(gates, (batch,), grid)
    shaped = shaped if channels_last else shaped.permute(0, 2, 3, 1)
    assert shaped.shape == (batch, height, width, count)
    for b, y, x in each(batch, height, width):
        rows, columns = patches_at(y, height, grid), patches_at(x, width, grid)
        assert rows and columns
        cells = [gates[b, prefix + i * grid + j] for i in rows for j in columns]
        torch.testing.assert_close(shaped[b, y, x], torch.stack(cells).mean(0))


@some
@given(SIZE, SIZE, st.integers(1, 3), st.lists(st.integers(-1, 11), min_size=6, max_size=6))
def test_rows_of_a_map_in_any_order(batch, count, grid, positions):
    gates = gates_of(batch, grid * grid, count)
    over_map = OverMap(True, (3, 4)).broadcast(gates, (batch,), grid).flatten(1, 2)
    shaped = Gathered((3, 4), (2, 3), tuple(positions)).broadcast(gates, (batch,), grid)
    assert shaped.shape == (2 * batch, 3, count)
    for b, m, r in each(batch, 2, 3):
        at = positions[3 * m + r]
        want = over_map[b, at] if at >= 0 else torch.zeros(count)
        assert torch.equal(shaped[2 * b + m, r], want)


@some
@given(SIZE, SIZE, st.booleans())
def test_rows_of_a_sequence_or_a_sample_in_windows(batch, count, one_for_all):
    gates = gates_of(batch, 1 if one_for_all else 4, count)
    shaped = Gathered(None, (2, 2), (3, 0, 2, 1)).broadcast(gates, (batch, 4), 0)
    expected = gates.expand(-1, 4, -1)[:, [3, 0, 2, 1]].reshape(2 * batch, 2, count)
    assert torch.equal(shaped, expected)
    of_samples = gates[:, 0]
    shaped = Gathered((), (3,), (0, 0, 0)).broadcast(of_samples, (batch,), 0)
    assert torch.equal(shaped, of_samples.repeat_interleave(3, 0))


@some
@given(SIZE, SIZE, SIZE, st.booleans())
def test_positions_of_a_line(batch, length, count, one_for_all):
    gates = gates_of(batch, 1 if one_for_all else length, count)
    shaped = Line().broadcast(gates, (batch, length), 0).expand(-1, -1, length)
    assert torch.equal(shaped, gates.expand(-1, length, -1).movedim(2, 1))


def test_layouts_with_equal_fields_are_equal():
    """Sites with equal layouts share the reshaped gates."""
    layouts = [Rows(3), Samples(3), Swapped(3), Flat(True), Flat(False), OverMap(True, None)]
    layouts += [OverMap(True, (3, 4)), OverMap(False, (3, 4)), Rows(4), Line()]
    layouts += [Gathered((3, 4), (2, 2), (0, 1, 2, -1)), Gathered(None, (2, 2), (0, 1, 2, -1))]
    again = [type(x)(*vars(x).values()) for x in layouts]
    assert len(set(layouts)) == len(layouts) and set(layouts) == set(again)


# -- views of a plan -------------------------------------------------------------------------------


def plan(*rows, experts=3, base=True, **more):
    share = gates_of(*rows, 1 + experts).softmax(-1)
    return RoutingPlan(
        tuple(range(experts)), share[..., 1:], share[..., :1] if base else None, experts, rows,
        **more,
    )  # fmt: skip


@some
@given(SIZE, SIZE, st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.5, 2.0]))
def test_scaled_gates_are_each_gate_by_the_scale_for_every_rank(b, s, experts, rank, scale):
    made = plan(b, s, experts=experts)
    view = view_plan(made, ScaledGates(Rows(3), torch.float64, rank, scale))
    assert view.shape == (b, s, experts * rank) and view.dtype == torch.float64
    for e, r in each(experts, rank):
        expected = (made.weights[..., e] * scale).double()
        torch.testing.assert_close(view[..., e * rank + r], expected)


def test_scaled_gates_over_a_map_lie_in_its_channels():
    made = plan(2, 4, grid=2, base=False)
    view = view_plan(made, ScaledGates(OverMap(False, (4, 6)), torch.float32, 2, 1.0))
    assert view.shape == (2, 6, 4, 6)
    assert torch.equal(view[:, 3, 2:, :3], made.weights[:, 2, 1, None, None].expand(2, 2, 3))


@pytest.mark.parametrize("rows", [(2, 3), (3, 1)])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("base", [True, False])
def test_sorted_gates_begin_with_the_frozen_model_where_it_has_one(rows, asked, base):
    made = plan(*rows, base=base, top_k=2)
    view = view_plan(made, SortedGates(Flat(False), base=asked))
    assert view.base == (asked and base) and view.top_k == 2
    expected = torch.cat([made.base, made.weights], -1) if view.base else made.weights
    assert torch.equal(view.gates, expected.flatten(0, 1))


def test_sorted_gates_go_to_the_rows_of_each_expert():
    """Of each row, the experts that it goes to; those with a gate of zero get none."""
    weights = torch.tensor([[[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]]])
    made = RoutingPlan((0, 1, 2), weights, None, 3, (1, 2), top_k=2)
    gates, dispatch = view_plan(made, SortedGates(Rows(3), base=False)).over((1, 2))
    assert torch.equal(gates, weights[0])
    assert dispatch.experts_TK.tolist() == [[1, 2], [0, -1]] and not dispatch.every


def test_without_an_expert_there_are_no_sorted_gates():
    none_on = RoutingPlan((), torch.zeros(2, 3, 0), torch.ones(2, 3, 1), 2, (2, 3))
    for layout in (Rows(3), Flat(True)):
        assert view_plan(none_on, SortedGates(layout, base=True)) is None
        assert view_plan(none_on, ScaledGates(layout, torch.float32, 4, 2.0)).numel() == 0


@pytest.mark.parametrize("rows", [(3,), (3, 1), (3, 5)])
def test_class_gates_are_logs_of_a_samples_mean_gates(rows):
    made = plan(*rows)
    view = view_plan(made, ClassGates())
    assert view.shape == (3, 4)
    full = made.gates
    for b, e in each(3, 4):
        shares = [full[(b, *s, e)].item() for s in each(*rows[1:])]
        assert view[b, e].item() == pytest.approx(math.log(sum(shares) / len(shares)), abs=1e-5)


def test_class_gates_of_zero_stay_finite():
    made = RoutingPlan((0,), torch.zeros(2, 1), torch.ones(2, 1), 1, (2,))
    view = view_plan(made, ClassGates())
    assert view.isfinite().all() and (view[:, 1] < -80).all() and (view[:, 0] == 0).all()


def test_classes_are_not_weighed_by_patches_or_without_the_frozen_model():
    ids, taken = torch.zeros(2, 3, 1, dtype=torch.long), torch.ones(2, 3, 1)
    assert view_plan(plan(2, 4, patch_ids=ids, patch_gates=taken, grid=2), ClassGates()) is None
    assert view_plan(plan(2, base=False), ClassGates()) is None
    made = plan(2)
    assert view_plan(made, ClassGates()) is not None and view_plan(made, WholePlan()) is made
