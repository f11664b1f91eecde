"""Routing kernels against the plain routes and plans, bit for bit where it is about order."""

import pytest
import torch
from kernel_inputs import gradients
from sentinels import guarded
from sweeps import some

from moe_rewrite.kernels.plan import launch, reference
from moe_rewrite.kernels.plan.op import route, sort_plan

pytestmark = pytest.mark.usefixtures("on_device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("normalize", some([True, False], [True]))
@pytest.mark.parametrize(("rows", "experts", "k"), [
    (13, 5, 2), (1, 1, 1), (70, 8, 8), (0, 4, 2), (2, 129, 2), (3, 5, 5), (33, 2, 1),
])  # fmt: skip
def test_routes_equal_the_reference(rows, experts, k, normalize):
    torch.manual_seed(rows + experts)
    for dtype in DTYPES:
        logits = (torch.randn(rows, experts) * 3).to(dtype)  # few values in 16 bits: ties
        found = gradients(lambda g: route(g["x"], k, normalize)[0], {"x": logits})  # noqa: B023
        exact = {"x": logits.double()}
        wanted = gradients(lambda g: reference.route(g["x"], k, normalize)[0], exact)  # noqa: B023
        chosen = route(logits, k, normalize)[1]
        assert torch.equal(chosen, reference.route(logits, k, normalize)[1])
        torch.testing.assert_close(found["y"].double(), wanted["y"], rtol=2e-6, atol=1e-7)
        close = (
            {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        )
        torch.testing.assert_close(found["x"].double(), wanted["x"], **close)


def test_ties_zeros_and_infinities():
    logits = torch.tensor([[0.0, -0.0, 0.0], [1.0, 1.0, -torch.inf], [-5.0, -4.0, -4.0]])
    for normalize in (True, False):
        for got, want in zip(
            route(logits, 2, normalize), reference.route(logits, 2, normalize), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("pairs", "experts"), [
    (1, 1), (0, 3), (77, 5), (90, 256), (1500, 2), (40, 64),
])  # fmt: skip
@pytest.mark.parametrize("spread", some(["random", "dropped", "one"], ["dropped"]))
def test_plans_equal_the_reference(pairs, experts, spread):
    torch.manual_seed(pairs)
    low, high = (-2, experts + 2) if spread == "dropped" else (0, experts)
    chosen = torch.randint(low, high, (pairs,))
    if spread == "one":
        chosen[:] = experts - 1
    first, second = (sort_plan(chosen, experts) for _ in range(2))
    for got, again, want in zip(first, second, reference.sort_plan(chosen, experts), strict=True):
        assert torch.equal(got, want) and torch.equal(got, again)


def test_more_blocks_than_a_scan_takes_at_once(monkeypatch):
    monkeypatch.setattr(launch, "SCAN", 4)
    chosen = torch.randint(0, 7, (4000,))
    assert all(map(torch.equal, sort_plan(chosen, 7), reference.sort_plan(chosen, 7)))


def test_nothing_is_written_outside_the_outputs():
    logits, chosen = torch.randn(11, 5), torch.randint(-1, 6, (37,))
    with guarded():
        gates, experts = launch.route(logits, 3, True)
        launch.route_backward(torch.randn(11, 3), logits, gates, experts, False)
        launch.sort_plan(chosen, 5)


def test_strided_logits():
    logits = torch.randn(6, 20)[:, ::2]
    for got, want in zip(route(logits, 3), reference.route(logits, 3), strict=True):
        torch.testing.assert_close(got, want)
