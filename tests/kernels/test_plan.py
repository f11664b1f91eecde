"""The routing ops on the CPU: against the reference, under opcheck and torch.compile."""

import pytest
import torch
from kernel_inputs import close, gradients

from moe_rewrite.kernels.plan import op, reference

SHAPES = [(13, 5, 2), (1, 1, 1), (0, 4, 2), (40, 256, 3), (7, 9, 9)]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_routes_equal_the_reference(shape, normalize):
    rows, experts, k = shape
    torch.manual_seed(rows)
    logits = torch.randn(rows, experts).double()
    for run in (op.route, torch.compile(op.route, backend="aot_eager", fullgraph=True)):
        for dtype in (torch.float64, torch.float32):
            found = gradients(lambda g: run(g["x"], k, normalize)[0], {"x": logits.to(dtype)})  # noqa: B023
            wanted = gradients(lambda g: reference.route(g["x"], k, normalize)[0], {"x": logits})
            close(found, wanted, dtype)
        assert torch.equal(run(logits, k)[1], reference.route(logits, k)[1])


@pytest.mark.parametrize(("pairs", "experts"), [(0, 3), (1, 1), (77, 5), (300, 256)])
def test_plans_equal_the_reference(pairs, experts):
    torch.manual_seed(pairs)
    chosen = torch.randint(-1, experts + 1, (pairs,))
    for run in (op.sort_plan, torch.compile(op.sort_plan, backend="aot_eager", fullgraph=True)):
        plan = run(chosen, experts)
        for got, want in zip(plan, reference.sort_plan(chosen, experts), strict=True):
            assert torch.equal(got, want)


def test_the_dense_plan_is_the_plan_of_every_expert_for_every_row():
    rows, experts = 6, 4
    chosen = torch.arange(experts).expand(rows, experts)
    for got, want in zip(
        op.dense_plan(rows, experts), reference.sort_plan(chosen, experts), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 5, 300])
def test_of_equal_scores_the_lower_place_comes_first(size, dtype):
    torch.manual_seed(size)
    few = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, torch.inf])
    scores = few[torch.randint(len(few), (2, 7, size))].to(dtype)  # most of them equal others
    for k in {1, (size + 1) // 2, size}:
        wanted = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(op.largest(scores, k), wanted)
        assert torch.equal(op.route(scores.clamp(-9, 9), k)[1], op.largest(scores.clamp(-9, 9), k))


def test_opcheck():
    logits = torch.randn(6, 5, requires_grad=True)
    for normalize in (True, False):
        torch.library.opcheck(op._route, (logits, 3, normalize))
        gates, experts = (t.detach() for t in op._route(logits, 3, normalize))
        args = (torch.randn(6, 3), logits.detach(), gates, experts, normalize)
        torch.library.opcheck(op._route_backward, args)
    torch.library.opcheck(op._sort_plan, (experts.flatten(), 5))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: op.route(torch.zeros(3, 4), 5), "k = 5"), (lambda: op.route(torch.zeros(3, 4), 0), "k = 0"),
    (lambda: op.route(torch.zeros(3, 4, dtype=torch.int64), 1), "dtype"),
    (lambda: op.sort_plan(torch.zeros(3), 2), "int64"),
    (lambda: op.sort_plan(torch.zeros(3, dtype=torch.int64), 0), "at least 1"),
])  # fmt: skip
def test_misfits_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
