"""Values that a sample has once: which operations keep samples apart, and their free sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite.analysis.places import NCHW, OfSample, SpatialDims, channel_dim
from moe_rewrite.analysis.sample_values import free_of_sizes
from moe_rewrite.analysis.spatial import propagate
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.pipeline import run

C = 4


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.group, self.linear, self.work = nn.GroupNorm(2, C), nn.Linear(C, C), work

    def forward(self, x):
        return self.work(self, x)


def followed(work, size, follow=propagate):
    program = run((Clean(),), program_of(Net(work), torch.zeros(2, C, *size)), Decisions("auto"))
    (entry,) = program.leaves()
    nodes = list(program.graph.nodes)
    return nodes, entry, follow(nodes, entry)


def taken(nodes, entry):
    return propagate(nodes, entry, statistics=True)


KEPT = {
    "mean": lambda m, x: x * x.mean((-2, -1), keepdim=True),
    "pooled": lambda m, x: x + F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "linear": lambda m, x: x * m.linear(x.mean((2, 3)))[:, :, None, None],
    "softmax": lambda m, x: x * x.mean((2, 3)).softmax(1)[:, :, None, None],
    "parts": lambda m, x: (
        x * torch.cat(x.mean((2, 3), keepdim=True).chunk(2, 1), 1)
    ),
    "norm": lambda m, x: m.group(x),
    "layer norm": lambda m, x: F.layer_norm(x, x.shape[1:]),
    "channels last": lambda m, x: (y := x.permute(0, 2, 3, 1)).mul(y.mean((1, 2), keepdim=True)).permute(0, 3, 1, 2),
}  # fmt: skip
LOST = {
    "over the batch": (lambda m, x: x * x.mean((2, 3)).softmax(0)[:, :, None, None], "samples apart"),
    "moved batch": (lambda m, x: x * x.mean((2, 3), keepdim=True).transpose(0, 1).sum(), "samples apart"),
    "over rows": (lambda m, x: x * x.mean(2, keepdim=True), "mixes all positions"),
    "half pooled": (lambda m, x: x * F.adaptive_avg_pool2d(x, (1, 2)).mean(-1, keepdim=True), "mixes all"),
    "other ranks": (lambda m, x: x * x.mean((2, 3)).mean(), "samples apart"),
    "moved norm": (lambda m, x: m.group(x.transpose(2, 3)), "dimensions were moved"),
}  # fmt: skip


@pytest.mark.parametrize("size", [(8, 12), (7, 7)])
@pytest.mark.parametrize("kind", KEPT)
def test_maps_with_values_of_samples_keep_their_positions(kind, size):
    nodes, _, places = followed(KEPT[kind], size, taken)
    assert places[nodes[-2]] == NCHW
    assert all(isinstance(p, SpatialDims | OfSample) for p in places.values())
    lost = [p for p in followed(KEPT[kind], size)[2].values() if isinstance(p, str)]
    assert "mixes all positions" in lost[0] or "more than channels" in lost[0]


@pytest.mark.parametrize("kind", LOST)
def test_what_mixes_samples_or_positions_is_lost(kind):
    work, words = LOST[kind]
    nodes, _, places = followed(work, (8, 8), taken)
    with pytest.raises(ValueError, match=words):
        raise ValueError(str(places[nodes[-2]]))


class Gate(nn.Module):
    def forward(self, x):
        batch, channels, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
        return x * y.view(batch, channels, 1, 1).expand_as(x)


def test_the_batch_is_no_size_of_a_gate():
    model, example = Gate(), torch.randn(3, C, 6, 5)
    program = program_of(model, example)
    (entry,) = program.leaves()
    free_of_sizes(program, taken(program.graph.nodes, entry))
    views = [n for n in program.graph.nodes if op_name(n) == "view"]
    assert [n.args[1] for n in views] == [[-1, C], [-1, C, 1, 1]]
    assert not any(op_name(n) == "expand_as" for n in program.graph.nodes)
    places = taken(program.graph.nodes, entry)
    assert [channel_dim(places[n], n) for n in views] == [1, 1]
