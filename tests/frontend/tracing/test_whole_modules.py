"""Modules whose code branches on values of tensors run as one call of the graph."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import WIDTH, Mlp
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError
from moe_rewrite.errors import CaptureError


class Looping(nn.Module):
    """Experts that loop over those that were chosen, as many mixtures of experts are written."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        chosen = self.gate(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for e in chosen.unique().tolist():
            at = (chosen == e).nonzero().squeeze(-1)
            out = out.index_add(0, at, self.experts[e](rows[at]))
        return x + out.view_as(x)


class Net(nn.Module):
    def __init__(self, kind=Looping):
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), kind(), Mlp(), kind(), Mlp()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_module_that_loops_over_values_is_one_call():
    model = Net().eval()
    moe = moe_rewrite.convert(model, split=2, example_inputs=torch.randn(2, 5, WIDTH))
    for size in ((2, 5), (1, 7), (6, 3)):
        assert moe_rewrite.verify(model, moe, torch.randn(*size, WIDTH)).equal
    with ThreadPoolExecutor(4) as pool:
        xs = [torch.randn(3, n, WIDTH) for n in range(3, 11)]
        same = pool.map(lambda x: torch.equal(moe(x), model(x)), xs)
    assert all(same)


def test_gradients_go_through_it():
    model = Net().eval()
    x = torch.randn(2, 5, WIDTH)
    moe = moe_rewrite.convert(model, split=2, example_inputs=x).train()
    moe(x).square().sum().backward()
    assert all(p.grad is not None for p in moe.trainable_parameters())
    site = [p for n, p in moe.named_parameters() if p.requires_grad]
    assert any(p.grad.abs().max() > 0 for p in site)
    assert all(p.grad is None for p in model.parameters())


class Selecting(nn.Module):
    """Gives as many rows as it finds positive."""

    def forward(self, x):
        return x[:, : int((x.mean((0, 2)) > -9).sum())] if x.mean() < 99 else x[:, :1]


def test_a_call_that_gives_another_shape_is_refused():
    model = Net(Selecting).eval()
    moe = moe_rewrite.convert(model, split=2, example_inputs=torch.randn(2, 5, WIDTH))
    with pytest.raises(MoeRewriteError, match="Selecting branches on values"):
        moe(torch.full((2, 5, WIDTH), 1e6))


class Counting(nn.Module):
    """Writes to a buffer."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x * 2 if x.sum() > 0 else x


def test_one_that_writes_is_refused():
    with pytest.raises(CaptureError, match="writes to its"):
        moe_rewrite.convert(Net(Counting).eval(), split=2, example_inputs=torch.randn(2, 5, WIDTH))


class Whole(nn.Module):
    """Branches itself, so that nothing would be left to convert."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x if x.sum() > 0 else -x
        return x


def test_a_model_that_branches_itself_is_refused():
    with pytest.raises(CaptureError, match="control flow"):
        moe_rewrite.convert(Whole(), split=1, example_inputs=torch.randn(2, 5, WIDTH))
