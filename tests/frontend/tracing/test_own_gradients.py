"""A torch.autograd.Function keeps its own backward in a converted model."""

import copy

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite.errors import CaptureError


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class Rounded(torch.autograd.Function):
    """Straight through; two outputs, of which one is no tensor."""

    @staticmethod
    def forward(ctx, x, shift):
        return x.round() + shift, None

    @staticmethod
    def backward(ctx, grad, _):
        return grad, grad.sum(0)


class Scaled(torch.autograd.Function):
    """By a size and a number of a list."""

    @staticmethod
    def forward(ctx, x, size, numbers):
        ctx.by = size * numbers[0]
        return x * ctx.by

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * ctx.by * grad, None, None


class Writes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.work = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), work
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == 2:
                x = self.work(self, x)
        return x


WORKS = {
    "reversed": lambda m, x: Reversed.apply(3 * x, 0.5),
    "twice": lambda m, x: Reversed.apply(x, 0.5) + Reversed.apply(x, 0.25),
    "a size": lambda m, x: Scaled.apply(x, x.shape[0], [0.1]) + Scaled.apply(x, x.shape[0], [0.2]),
    "rounded": lambda m, x: Rounded.apply(4 * x, m.shift)[0],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_gradients_are_the_dense_models(name, training):
    dense = Net(WORKS[name])
    moe = moe_rewrite.convert(dense, split=1, example_inputs=torch.randn(3, 6), freeze=False)
    dense, x = copy.deepcopy(dense), torch.randn(5, 6)
    moe.train(training)(x).square().sum().backward()
    dense(x).square().sum().backward()
    own = moe.state_dict(keep_vars=True)
    for key, p in dense.named_parameters():
        assert p.grad is None or torch.allclose(own[key].grad, p.grad, atol=1e-6), key


def test_a_pointwise_function_may_be_inside_of_a_feed_forward():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x):
            return x + self.down(Reversed.apply(torch.tanh(self.up(x)), 0.5))

    dense, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(5, 6)
    moe = moe_rewrite.convert(dense, "upcycle", split=1, num_experts=3, example_inputs=x)
    for model in (moe, twin := copy.deepcopy(dense)):
        model(x).square().sum().backward()
    own = moe.state_dict(keep_vars=True)
    assert torch.allclose(
        own["0.up.weight"].grad, twin.get_parameter("0.up.weight").grad, atol=1e-6
    )


def test_a_function_that_writes_into_its_input_is_named():
    with pytest.raises(CaptureError, match="Writes, a torch.autograd.Function, writes into its"):
        moe_rewrite.convert(
            Net(lambda m, x: Writes.apply(x.clone())), split=1, example_inputs=torch.randn(3, 6)
        )


def test_functions_run_as_before_outside_of_a_trace():
    before = torch.autograd.Function.__dict__["apply"]
    moe_rewrite.inspect(Net(WORKS["reversed"]), torch.randn(3, 6))
    assert torch.autograd.Function.__dict__["apply"] is before
