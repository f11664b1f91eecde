"""A forward that casts a submodule to the dtype that it has converts."""

import pytest
import torch
from networks import WIDTH, Mlp
from torch import nn

import moe_rewrite
from moe_rewrite.errors import CaptureError


class Casting(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.layers = dtype, nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer.to(self.dtype)(x.to(self.dtype)).float()
        return x


def test_a_cast_that_changes_nothing_is_skipped():
    model, x, to = Casting(torch.float32).eval(), torch.randn(2, 5, WIDTH), nn.Module.to
    moe = moe_rewrite.convert(model, split=1, example_inputs=x)
    assert moe.report.equivalence.equal
    assert nn.Module.to is to


def test_one_that_changes_something_is_refused():
    model = Casting(torch.float64).eval()
    with pytest.raises(CaptureError):
        moe_rewrite.convert(model, split=1, example_inputs=torch.randn(2, 5, WIDTH))
    assert model.layers[0].up.weight.dtype == torch.float32
