"""Large results take the memory that the last ones left, and nothing that is still in use."""

import gc

import pytest
import torch
from kernel_inputs import ffn_inputs

from moe_rewrite.kernels import buffer_reuse
from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import sort_plan


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(buffer_reuse, "LARGE", 0)
    monkeypatch.setattr(buffer_reuse, "_of_weights", type(buffer_reuse._of_weights)())
    monkeypatch.setattr(buffer_reuse, "_of_calls", {})


def of(weight, *size, use="gradient"):
    return buffer_reuse.reused(weight, *size, owner=weight, use=use)


def test_memory_is_taken_again_once_it_is_free():
    weight = torch.randn(4, 5)
    first = of(weight, 4, 5)
    place = first.data_ptr()
    assert of(weight, 4, 5, use="products").data_ptr() != place
    del first
    again = of(weight, 4, 4)  # a smaller batch
    assert again.data_ptr() == place and again.shape == (4, 4) and again.is_contiguous()


@pytest.mark.parametrize("hold", [
    lambda t: t, lambda t: t[1:], lambda t: t.detach().numpy(), lambda t: t.untyped_storage(),
], ids=["tensor", "view", "array", "storage"])  # fmt: skip
def test_memory_that_something_holds_is_left_alone(hold):
    weight = torch.randn(4, 5)
    made = of(weight, 4, 5)
    place, held = made.data_ptr(), hold(made)
    del made
    assert of(weight, 4, 5).data_ptr() != place
    del held


def test_other_sizes_get_their_own_and_what_is_kept_is_bounded(monkeypatch):
    weight = torch.randn(4, 5)
    of(weight, 4, 5)
    assert of(weight, 40, 5).shape == (40, 5)  # more than was kept
    assert of(weight, 2, 5).shape == (2, 5)  # less than half of it
    monkeypatch.setattr(buffer_reuse, "MOST", 100)
    other = torch.randn(4, 5)
    of(other, 4, 5)
    assert not buffer_reuse._of_weights[other]


def test_what_is_kept_goes_with_the_weight():
    weight = torch.randn(4, 5)
    of(weight, 4, 5)
    assert len(buffer_reuse._of_weights) == 1
    del weight
    gc.collect()
    assert not len(buffer_reuse._of_weights)


def test_steps_equal_those_in_new_memory(monkeypatch):
    """Gradients that a step left in place, or added to, are no later step's."""
    given = ffn_inputs(30, 6, 10, 4, 2, ["up", "down", "gate"], seed=0)
    plan = sort_plan(given["experts"], 4)

    def steps():
        names = {"up": "up_EHD", "down": "down_EDH", "gate": "gate_EHD"}
        weights = {n: given[k].float().requires_grad_() for k, n in names.items()}
        seen = []
        for i in range(5):
            x = given["x"].float() * (i + 1)
            y = ffn_experts(x, given["gates"].float(), given["experts"], plan, **weights)
            y.square().sum().backward(retain_graph=True)
            now = [w.grad for w in weights.values()]
            seen += now if i % 2 else [g.clone() for g in now]  # later steps must not write there
            del now
            if i == 2:
                y.square().sum().backward()  # once more through what was saved, and added up
            if i != 3:
                for w in weights.values():
                    w.grad = None
        return seen

    reusing = [g.clone() for g in steps()]
    monkeypatch.setattr(buffer_reuse, "LARGE", 1 << 40)
    for got, expected in zip(reusing, steps(), strict=True):
        assert torch.equal(got, expected)


def test_inference_mode_and_training_in_turn():
    given = ffn_inputs(30, 6, 10, 4, 2, ["up", "down", "gate"], seed=1)
    weights = {k + n: given[k].float().requires_grad_() for k, n in
               (("up", "_EHD"), ("down", "_EDH"), ("gate", "_EHD"))}  # fmt: skip

    def run():
        return ffn_experts(
            given["x"].float(), given["gates"].float(), given["experts"], None, **weights
        )

    with torch.inference_mode():
        first = run().clone()
    for _ in range(2):
        y = run()
        y.sum().backward()
        assert torch.equal(y, first)
        with torch.inference_mode():
            assert torch.equal(run(), first)
