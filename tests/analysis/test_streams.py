"""Models that keep several feature vectors a position are cut and routed by position."""

import pytest
import torch
from networks import WIDTH, Mlp
from torch import nn

import moe_rewrite


class Streams(nn.Module):
    """Each block reads a mixture of the streams and writes to all of them."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.embed = nn.Embedding(20, WIDTH)
        self.mix = nn.Parameter(torch.randn(4, 3) / 2)
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids):
        at = 0 if self.first else 2
        x = torch.stack([self.embed(ids)] * 3, at)
        for i, layer in enumerate(self.layers):
            weights = self.mix[i].view(3, 1, 1, 1) if self.first else self.mix[i].view(3, 1)
            x = x + (layer((x * weights).sum(at)).unsqueeze(at) * weights)
        return x.mean(at)


@pytest.mark.parametrize("first", [True, False])
def test_streams_are_features_of_their_position(first):
    model, ids = Streams(first).eval(), torch.randint(20, (2, 5))
    moe = moe_rewrite.convert(model, split=2, example_inputs=ids)
    assert moe.report.equivalence.equal
    assert moe_rewrite.verify(model, moe, torch.randint(20, (3, 8))).equal
    moe.expand(1)
    plan = moe.route(torch.randint(20, (3, 8)))
    assert plan.gates.shape[:2] == (3, 8)
    assert moe_rewrite.verify(model, moe, ids).equal
