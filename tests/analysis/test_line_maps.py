"""Maps over a line are told by operations, whatever their sizes are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite.analysis.line_maps import is_line_map
from moe_rewrite.errors import ConversionError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import output_of

N = 8  # channels, and positions


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(N, N, 3, padding=1), nn.Linear(N, N)
        self.norm, self.last = nn.BatchNorm1d(N), nn.LayerNorm(N)
        self.work = work

    def forward(self, x):
        return self.work(self, x)


LINES = {
    "convolution": lambda m, x: m.conv(x),
    "activation": lambda m, x: F.gelu(m.conv(x)) * 2,
    "norm": lambda m, x: m.norm(x + 1),
    "residual": lambda m, x: x + torch.relu(m.norm(m.conv(x))),
    "there and back": lambda m, x: m.linear(m.conv(x).transpose(1, 2)).transpose(1, 2) + m.conv(x),
    "pooled": lambda m, x: F.avg_pool1d(m.conv(x), 2),
}
ROWS = {
    "linear": lambda m, x: torch.relu(m.linear(x)),
    "norm": lambda m, x: m.last(x),
    "turned": lambda m, x: m.conv(x).transpose(1, 2) + 1,
    "permuted": lambda m, x: torch.relu(m.conv(x)).permute(0, 2, 1),
    "patches of an image": lambda m, x: (
        F.conv2d(x[:, None], m.conv.weight[:, :1, :, None]).flatten(2).transpose(1, 2) * 2
    ),
    "linear after it": lambda m, x: m.linear(m.conv(x).mT),
}


@pytest.mark.parametrize(("work", "line"), [
    *((w, True) for w in LINES.values()), *((w, False) for w in ROWS.values()),
], ids=[*LINES, *ROWS])  # fmt: skip
def test_what_the_second_dimension_is(work, line):
    (made,) = output_of(program_of(Net(work), torch.zeros(3, N, N)).graph)
    assert is_line_map(made) == line


class Audio(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(N, N, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x.mean(2))


@pytest.mark.parametrize("length", [N, 2 * N])
def test_a_cut_in_a_line_map_is_refused_whatever_its_sizes(length):
    with pytest.raises(ConversionError, match=r"a map over a line \(batch, channels, length\)"):
        moe_rewrite.convert(Audio(), split=2, example_inputs=torch.zeros(2, N, length))
