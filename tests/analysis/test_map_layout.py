"""Where features are is told by operations, whatever the sizes are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite.analysis.map_layout import features_at, is_channels_last, is_line_map
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
    "turned by mT": lambda m, x: m.conv(x).mT,
    "moved": lambda m, x: m.conv(x).movedim(1, -1),
    "moved among others": lambda m, x: m.conv(x).movedim((0, 2), (0, 1)),
    "axes swapped": lambda m, x: m.conv(x).swapaxes(-1, 1) * 2,
}


@pytest.mark.parametrize(("work", "line"), [
    *((w, True) for w in LINES.values()), *((w, False) for w in ROWS.values()),
], ids=[*LINES, *ROWS])  # fmt: skip
def test_what_the_second_dimension_is(work, line):
    (made,) = output_of(program_of(Net(work), torch.zeros(3, N, N)).graph)
    assert is_line_map(made) == line


class MapNet(nn.Module):
    """Sides of a map, and channels, are all of one size."""

    def __init__(self, work):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(N, N, 3, padding=1), nn.Linear(N, N)
        self.norm, self.last = nn.BatchNorm2d(N), nn.LayerNorm(N)
        self.work = work

    def forward(self, x):
        return self.work(self, x)


def last(m, x):
    return m.last(x.permute(0, 2, 3, 1))


AT = {
    "convolution": (lambda m, x: torch.relu(m.conv(x)), 1),
    "sum": (lambda m, x: x + m.norm(x), 1),
    "pooled": (lambda m, x: F.max_pool2d(x * 2, 2), 1),
    "moved": (lambda m, x: m.conv(x).permute(0, 2, 3, 1) * 2, 3),
    "linear": (lambda m, x: m.linear(x).relu(), 3),
    "windows and back": (
        lambda m, x: (
            last(m, x).roll((-1, -1), (1, 2)).view(-1, 2, 4, 2, 4, N).permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, 16, N).unflatten(0, (-1, 2, 2)).flatten(1, 3).view(-1, N, N, N)
        ),
        3,
    ),
    "patches merged": (
        lambda m, x: torch.cat([(y := last(m, x))[:, ::2, ::2], y[:, 1::2, ::2]], -1), 3,
    ),
    "tokens as a map": (
        lambda m, x: m.conv(x).flatten(2).transpose(1, 2).reshape(-1, N, N, N) + 1, 3,
    ),
    "tokens as a map, moved back": (lambda m, x: m.conv(x).flatten(2).view(-1, N, N, N) + 1, 1),
    "nothing tells": (lambda m, x: torch.relu(x) + 1, None),
    "norm over two": (lambda m, x: F.layer_norm(x, (N, N)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", AT)
def test_where_a_map_has_its_features(case):
    work, expected = AT[case]
    (made,) = output_of(program_of(MapNet(work), torch.zeros(3, N, N, N)).graph)
    assert features_at(made) == expected and is_channels_last(made) == (expected == 3)
    assert not is_line_map(made)
