"""Many LoRA experts with few rows each: one product over padded rows gives what a loop does."""

import pytest
import torch

from moe_rewrite.kernels.lora import padded
from moe_rewrite.kernels.lora.grouped import lora_grouped
from moe_rewrite.kernels.lora.reference import lora_linear
from moe_rewrite.kernels.plan.op import sort_plan


@pytest.mark.parametrize(("rows", "experts", "k"), [(40, 30, 1), (25, 12, 2), (20, 14, 1)])
def test_padded_products_are_those_of_every_expert(rows, experts, k):
    draw = torch.Generator().manual_seed(rows)
    rank, width, out = 3, 10, 7
    x, weight = torch.randn(rows, width, generator=draw), torch.randn(out, width, generator=draw)
    a = torch.randn(experts * rank, width, generator=draw).requires_grad_()
    b = torch.randn(out, experts * rank, generator=draw).requires_grad_()
    scores = torch.rand(rows, experts, generator=draw)
    chosen = scores.topk(k).indices
    if k > 1:
        chosen[::4, 1] = -1  # rows with fewer experts
    plan = sort_plan(chosen, experts)
    assert padded.fits(plan.offsets)
    gates = torch.rand(rows, k, generator=draw)
    dense = torch.zeros(rows, experts + 1).scatter(1, chosen % (experts + 1), gates)[:, :experts]
    want = lora_linear(x, weight, None, dense.repeat_interleave(rank, 1), a, b)
    for need in (True, False):
        with torch.set_grad_enabled(need):
            got = lora_grouped(x, weight, None, gates, plan, a, b, rank)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        if need:
            ours = torch.autograd.grad(got.square().sum(), (a, b))
            theirs = torch.autograd.grad(want.square().sum(), (a, b), retain_graph=True)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_experts_with_very_different_numbers_of_rows_are_not_padded():
    chosen = torch.cat([torch.zeros(200, dtype=torch.long), torch.arange(1, 20)]).unsqueeze(1)
    assert not padded.fits(sort_plan(chosen, 20).offsets)
    assert not padded.fits(sort_plan(torch.arange(4).unsqueeze(1), 20).offsets)
