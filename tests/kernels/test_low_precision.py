"""Products with int8 and bfloat16 weights against the float ones."""

import pytest
import torch
import torch.nn.functional as F

from moe_rewrite.kernels.ffn import low_precision
from moe_rewrite.kernels.ffn.low_precision import LowPrecision, grouped_linear, linear, rounded


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (64, 512)])
def test_a_row_is_rounded_to_half_a_step_of_its_largest_value(shape):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    values, scale = rounded(x)
    assert (x - values * scale).abs().le(0.5001 * scale).all()
    assert values.abs().amax(1).eq(127).all()
    values, scale = rounded(torch.zeros(shape))
    assert not (values * scale).any()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("sizes", [[1], [3, 1, 20], [5, 2]])
@pytest.mark.parametrize(("wide", "long"), [(16, 33), (65, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_go_through_their_own_weights(dtype, sizes, wide, long, bias):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), wide)
    plain = [torch.randn(long, wide) for _ in sizes]
    biases = [torch.randn(long) for _ in sizes] if bias else None
    weights = [LowPrecision.of(w, dtype) for w in plain]
    weights[-1] = plain[-1]  # a frozen model beside the experts is in full precision
    parts = x.split(sizes)
    every = biases or [None] * len(sizes)
    want = torch.cat([F.linear(p, w, b) for p, w, b in zip(parts, plain, every, strict=True)])
    made = grouped_linear(x, weights, biases, sizes)
    assert (made - want).norm() < 0.02 * want.norm()
    torch.testing.assert_close(made[-sizes[-1] :], want[-sizes[-1] :])
    in_floats = [linear(p, w, b) for p, w, b in zip(parts, weights, every, strict=True)]
    assert (torch.cat(in_floats) - want).norm() < 0.02 * want.norm()


def test_int8_products_of_a_row_do_not_depend_on_the_others():
    weight = LowPrecision.of(torch.randn(40, 96), "int8")
    x = torch.randn(9, 96)
    together = grouped_linear(x, [weight], None, [9])
    apart = torch.cat([grouped_linear(row[None], [weight], None, [1]) for row in x])
    assert torch.equal(together, apart) == low_precision.sums_exactly()


def test_int8_products_are_the_integers_own():
    values = torch.randint(-127, 128, (5, 600)).to(torch.int8)
    values[:, 0] = 127
    weight = LowPrecision(torch.full((2, 600), 127, dtype=torch.int8), torch.ones(2))
    made = grouped_linear(values.double(), [weight], None, [5])
    want = 127 * values.double().sum(1)
    torch.testing.assert_close(made, want[:, None].expand(5, 2))


def test_without_exact_integer_sums_floats_are_multiplied(monkeypatch):
    monkeypatch.setattr(low_precision, "sums_exactly", lambda: False)
    weight = LowPrecision.of(torch.randn(7, 30), "int8")
    x = torch.randn(4, 30)
    torch.testing.assert_close(
        grouped_linear(x, [weight], None, [4]), F.linear(x, weight.to(x.dtype))
    )
