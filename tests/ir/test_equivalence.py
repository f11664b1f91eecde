"""How two outputs are compared."""

import math

import pytest
import torch

from moe_rewrite.ir.equivalence import PIECE, TOLERANCE, compare

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_errors_are_of_the_largest_value(dtype):
    dense = torch.linspace(-8, 8, 33, dtype=dtype).view(3, 11)
    ours = dense.clone()
    ours[1, 2] += 1
    report = compare([dense], [ours])
    assert not report.equal and report.max_error == pytest.approx(1 / 8)
    assert report.rms_error == pytest.approx(1 / 8 / 33**0.5)
    same = compare([dense], [dense.clone()])
    assert same.exact and same.equal and same.max_error == same.rms_error == 0.0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_is_that_of_the_passes(dtype):
    """Room for reordered sums if any pass declares them; none if all passes are exact."""
    dense = torch.linspace(-8, 8, 33, dtype=dtype)
    near, far = (dense.clone() for _ in range(2))
    near[5] += 8 * TOLERANCE[dtype] / 2
    far[5] += 8 * TOLERANCE[dtype] * 2
    exact, reordered = [("a", "exact"), ("b", "approximate")], [("a", "exact"), ("b", "reordered")]
    assert compare([dense], [near], numerics=reordered).equal
    assert not compare([dense], [far], numerics=reordered).equal
    assert not compare([dense], [near], numerics=exact).equal
    assert compare([dense], [dense.clone()], numerics=exact).equal


@pytest.mark.parametrize(("largest", "wrong"), [(0, -1), (-1, 0), (PIECE, PIECE - 1)])
def test_large_outputs_are_one(largest, wrong):
    """However many pieces they are compared in."""
    dense = torch.zeros(3, PIECE)
    dense.view(-1)[largest] = -4
    ours = dense.clone()
    ours.view(-1)[wrong] += 1
    report = compare([dense[:1], dense], [dense[:1].clone(), ours])
    assert not report.equal and report.max_error == 1 / 4
    assert report.rms_error == pytest.approx(1 / 4 / (4 * PIECE) ** 0.5)


@pytest.mark.parametrize(
    ("dense", "ours", "equal"),
    [
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([NAN, NAN], [NAN, 0.0], False),
    ],
)
def test_no_number_equals_no_number_only(dense, ours, equal):
    assert compare([torch.tensor(dense)], [torch.tensor(ours)]).equal == equal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_what_is_compared_stays_as_it_was(dtype):
    outputs = [torch.arange(6).to(dtype), torch.arange(6).to(dtype) + 1]
    before = [t.clone() for t in outputs]
    compare(outputs[:1], outputs[1:])
    assert all(torch.equal(t, b) for t, b in zip(outputs, before, strict=True))


def test_each_output_has_the_tolerance_of_its_own_dtype():
    """Rounding in a float output next to an int output that is equal."""
    x, i = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    near = x * (1 + 2e-7)
    assert compare([x, i], [near, i]).equal and compare([i, x], [i, near]).equal
    assert not compare([x, i], [near, i + 1]).equal
    assert not compare([x.half(), x], [x.half(), x * 1.001]).equal


def test_imaginary_parts_and_bools_count():
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert compare([z], [z * (1 + 1e-7)]).equal and compare([z], [z.clone()]).exact
    assert not compare([z], [z + 5j]).equal
    flags = torch.tensor([True, False])
    assert compare([flags], [flags.clone()]).exact and not compare([flags], [~flags]).equal


def test_an_output_is_as_exact_as_what_it_was_computed_from():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = x * (1 + 2e-7), x * (1 + 1e-4)
    floats, halves = {torch.float32}, {torch.float32, torch.bfloat16}
    assert not compare([x], [near]).equal and compare([x], [near], computed=floats).equal
    assert not compare([x], [far], computed=floats).equal
    assert compare([x], [far], computed=halves).equal
    exact = (("a pass", "exact"),)
    assert not compare([x], [near], numerics=exact, computed=halves).equal
