"""How well tasks are told apart is asked about samples that the router was not solved on."""

import pytest
import torch

from moe_rewrite import TokenRouter
from moe_rewrite.routing.class_sums import products_of
from moe_rewrite.routing.ridge_gate import AnalyticGate
from moe_rewrite.routing.separation import _solved, separation
from moe_rewrite.routing.token_gate import TokenGate

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("projection", [8, 60])  # fewer than the 42 rows, and more
def test_rows_are_those_of_the_gate(projection):
    spec = TokenRouter(fit="analytic", projection=projection, base=False, ridge=0.01)
    gate = AnalyticGate(spec, 4, CPU)
    gate.add(2, active=True)
    rows = [drawn(5, 3, projection, seed=1), drawn(9, 3, projection, seed=2) + 0.5]
    for expert, of in enumerate(rows):
        gate.tell(expert, products_of(of.flatten(0, 1), None))
    solved = _solved(rows, spec.ridge).T.float()
    for row, expected in zip(solved, gate.rows, strict=True):
        torch.testing.assert_close(row, expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_differs_is_told_apart_and_what_does_not_is_not():
    apart = [drawn(12, 2, 16, seed=task) + 9 * torch.eye(16)[task] for task in range(3)]
    assert separation(apart, 1e-3) == (1.0, 0.0)
    # more random features than rows: those that it was solved on are told apart without exception
    same = [drawn(40, 1, 200, seed=task) for task in range(2)]
    accuracy, error = separation(same, 1e-3)
    assert abs(accuracy - 0.5) < 4 * error and 0.03 < error < 0.1


def test_tasks_count_alike_whatever_their_samples():
    few, many = drawn(4, 1, 6, seed=1), drawn(400, 1, 6, seed=2)
    accuracy, _ = separation([few, many], 1e-3)
    assert accuracy < 0.9  # not the share of `many`


@pytest.mark.parametrize("granularity", ["prefix", "token", "sequence"])
def test_positions_are_evenly_spaced_among_those_that_count(granularity):
    gate = TokenGate(TokenRouter(granularity=granularity, normalize=False), 3, CPU)
    x, mask = drawn(3, 9, 3), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = mask[2, :7] = 0  # padded on the right; on the left, fewer than are asked for
    places = [[2, 4, 6, 8], [1, 2, 3, 4], [7, 7, 8, 8]]
    found = gate.sampled(x, mask, 4)
    for row, at in enumerate(places):
        kept = mask[row] != 0
        if granularity == "sequence":
            expected = x[row][kept].mean(0, keepdim=True)
        elif granularity == "token":
            expected = x[row][at]
        else:
            expected = torch.stack([x[row][: p + 1][kept[: p + 1]].mean(0) for p in at])
        torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(gate.sampled(x[:1], None, 3), gate.sampled(x[:1], mask[:1], 3))
