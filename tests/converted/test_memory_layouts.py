"""Calls whose weights or inputs have another memory layout than the example's."""

import pytest
import torch
from reference import added, randomize
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, PatchRouter, RegionExperts, TokenRouter

pytestmark = pytest.mark.filterwarnings("ignore:the experts take")
SAMPLES = TokenRouter(granularity="sequence")


class Maps(nn.Module):
    """Makes vectors of maps by `end`, with a stage whose maps are reshaped too."""

    def __init__(self, end):
        super().__init__()
        self.trunk, self.stage = nn.Conv2d(3, 4, 3, 1, 1), Reshaped()
        self.last, self.end = nn.Linear(4 * 6 * 6, 5), end

    def forward(self, x):
        return self.last(self.end(self.stage(torch.tanh(self.trunk(x)))))


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x):
        batch, channels, rows, cols = x.shape
        x = self.a(x).reshape(batch, 2, channels // 2, rows, cols).transpose(1, 2)
        return self.b(torch.relu(x.reshape(batch, channels, rows, cols)))


class Rows(nn.Module):
    """Heads and back, as attention writes them."""

    def __init__(self, start):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.start = start

    def forward(self, x):
        batch, length, _ = x.shape
        x = self.start(x)
        for layer in self.layers:
            y = layer(x).view(batch, length, 2, 3).transpose(1, 2)
            x = x + torch.tanh(y).transpose(1, 2).contiguous().view(batch, length, 6)
        return x


ENDS = {
    "contiguous": lambda x: x.contiguous().view(x.shape[0], -1),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "written": lambda x: write_half(x),
}
STARTS = {
    "contiguous": lambda x: x.contiguous().view(-1, 6).view(x.shape),
    "reshape": lambda x: x.reshape(-1, 6).reshape(x.shape),
    "flatten": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "written": lambda x: write_half(x.contiguous()).view(x.shape),
}


def write_half(x):
    """A copy, of which a view is written to."""
    y = x.clone(memory_format=torch.contiguous_format)
    y.view(x.shape[0], -1).mul_(0.5)
    return y.view(x.shape[0], -1)


def gradients(moe, x):
    """An output and the gradients of the experts."""
    made = moe(x)
    weights = torch.arange(made.numel()).view(made.shape).sin()
    moe.zero_grad()
    (made * weights).sum().backward()
    return made.detach(), [p.grad.clone() for p in added(moe).values() if p.grad is not None]


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 3, 6, 6), (1, 3, 6, 6), (4, 3, 6, 6)])
@pytest.mark.parametrize("experts", [LoRAExperts(rank=2), RegionExperts("stage")])
@pytest.mark.parametrize("end", ENDS)
def test_weights_and_images_with_channels_last(end, experts, size):
    torch.manual_seed(0)
    model = Maps(ENDS[end]).eval()
    moe = moe_rewrite.convert(
        model, split="stage", router=PatchRouter(2, 2), experts=experts, num_experts=2,
        example_inputs=torch.randn(3, 3, 6, 6),
    )  # fmt: skip
    x = torch.randn(size)
    with torch.no_grad(), moe.disable_experts():
        assert torch.equal(moe(x), model(x))
    randomize(moe)
    want = gradients(moe, x)
    moe.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    for form in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=form)
        close(gradients(moe, given), want)
        with torch.no_grad(), moe.disable_experts():
            torch.testing.assert_close(moe(given), model(given))


@pytest.mark.parametrize("start", STARTS)
def test_inputs_that_are_not_contiguous(start):
    torch.manual_seed(0)
    model = Rows(STARTS[start]).eval()
    moe = moe_rewrite.convert(
        model, split="layers.1", router=TokenRouter(), num_experts=2,
        experts=LoRAExperts(rank=2, sites="all+head"), example_inputs=torch.randn(2, 5, 6),
    )  # fmt: skip
    x = torch.randn(2, 5, 6)
    moe(x)  # a graph for contiguous inputs
    given = {
        "transposed": torch.randn(5, 3, 6).transpose(0, 1),
        "expanded": torch.randn(1, 4, 6).expand(3, -1, -1),
        "all expanded": torch.randn(6).expand(2, 7, 6),
        "strided": torch.randn(2, 10, 12)[:, ::2, ::2],
        "features first": torch.randn(2, 6, 4).transpose(1, 2),
    }
    for tensor in given.values():
        with torch.no_grad(), moe.disable_experts():
            assert torch.equal(moe(tensor), model(tensor))
    randomize(moe)
    for tensor in given.values():
        close(gradients(moe, tensor), gradients(moe, tensor.contiguous()))
