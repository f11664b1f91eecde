"""The window that each position reads of the previous map, compared with changing single pixels."""

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_rewrite.analysis.spatial import NCHW, SpatialDims, propagate
from moe_rewrite.analysis.windows import Window, windows
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.pipeline import run

C = 4
SIZES = [(8, 12), (7, 5)]


class Net(nn.Module):
    """The layers that a test puts together."""

    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide = nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, 6, (1, 3), 2, (1, 2))
        self.even, self.dilated = (
            nn.Conv2d(C, C, (4, 2), padding="same"),
            nn.Conv2d(C, C, 3, 1, 1, 2),
        )
        self.apart = nn.Conv2d(C, C, 2, 2, groups=C)
        self.batch, self.prelu = nn.BatchNorm2d(C), nn.PReLU(C)
        self.layer = nn.LayerNorm(C)
        self.linear, self.scale = nn.Linear(C, C), nn.Parameter(torch.rand(C, 1, 1))
        self.work = work

    def forward(self, x):
        return self.work(self, x)


def last(work):
    """Work on a map whose channels come last."""
    return lambda m, x: work(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


KEPT = {
    "pointwise": lambda m, x: torch.tanh(x * 0.1) + torch.relu(x),
    "the same value everywhere": lambda m, x: (x * m.scale + 0.5) / torch.full((1, C, 1, 1), 3.0),
    "convolution": lambda m, x: m.conv(x),
    "stride and padding by axis": lambda m, x: m.wide(x),
    "even kernel, padded to the same size": lambda m, x: m.even(x),
    "dilated": lambda m, x: m.dilated(x),
    "depthwise": lambda m, x: m.apart(x),
    "general convolution": lambda m, x: torch.convolution(
        x, m.conv.weight, None, [2, 1], [1, 0], [1, 1], False, [0, 0], 1
    ),
    "maximum": lambda m, x: F.max_pool2d(x, 3, 2, 1),
    "maximum, dilated": lambda m, x: F.max_pool2d(x, (2, 1), (1, 2), dilation=(2, 1)),
    "average": lambda m, x: F.avg_pool2d(x, (3, 2), padding=(1, 0)),
    "average without a border": lambda m, x: F.avg_pool2d(x, 2, count_include_pad=False),
    "padded": lambda m, x: F.pad(x, (1, 0, 2, 1), value=3.0),
    "cropped by padding": lambda m, x: F.pad(x, (-1, 2, 1, -2)),
    "padded channels": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "every second row": lambda m, x: x[:, :, 1::2],
    "every third column": lambda m, x: x[..., 2::3],
    "some channels": lambda m, x: x[:, 1:3],
    "batch statistics on record": lambda m, x: m.prelu(m.batch(x)),
    "over channels": lambda m, x: x.softmax(1) + x.log_softmax(-3),
    "channels last": last(lambda m, x: m.linear(m.layer(x))),
    "channels last, padded": last(lambda m, x: F.pad(m.linear(x), (0, 0, 1, 0, 0, 2))),
    "channels last, every second row": last(lambda m, x: x[:, 1::2]),
    "transposed and back": lambda m, x: (x.transpose(2, 3) * 2.0).transpose(-1, -2),
    "parts of the channels": lambda m, x: torch.mul(*m.conv(x).chunk(2, 1)),
    "put together": lambda m, x: torch.cat([x, m.conv(x), x[:, :1]], 1),
    "residual": lambda m, x: torch.tanh(x + m.conv(F.gelu(m.conv(x))) / 9),
    "one after another": lambda m, x: m.conv(m.wide(F.max_pool2d(x, 2, 1))[:, :C].sin()),
    "in place": lambda m, x: m.conv(m.conv(x).sin_().mul_(2.0)),
}  # fmt: skip


@cache
def followed(work, size):
    """Of a graph: its nodes, its map, and the places in it."""
    program = run((Clean(),), program_of(Net(work), torch.zeros(2, C, *size)), Decisions("auto"))
    (entry,) = program.leaves()
    return list(program.graph.nodes), entry, propagate(program.graph.nodes, entry)


def read(nodes, entry, places, dim):
    """By the windows: the entry's positions that each output position reads along one axis."""
    at = 0 if dim == "rows" else 1
    sets = {entry: [{i} for i in range(value(entry).shape[2 + at])]}
    for node in nodes:
        if node not in places or node is entry:
            continue
        window = windows(node, places[node])[at]
        sources = [sets[s] for s in node.all_input_nodes if s in places]
        out, length = value(node), len(sources[0])
        if isinstance(out, torch.Tensor):
            length = out.shape[getattr(places[node], dim)]
        sets[node] = [set() for _ in range(length)]
        for (r, found), source in itertools.product(enumerate(sets[node]), sources):
            for t in range(window.kernel):
                position = r * window.stride - window.padding + window.dilation * t
                found |= source[position] if 0 <= position < len(source) else set()
    return sets[node]


def changed(work, size):
    """By running: (pixels, rows, columns), whether another value of a pixel is seen there."""
    model, (height, width) = Net(work).double().eval(), size
    pixels = height * width
    x = torch.randn(1, C, height, width, dtype=torch.float64).repeat(pixels + 1, 1, 1, 1)
    x[:pixels].flatten(2)[range(pixels), :, range(pixels)] += 50 + 10 * torch.rand(C).double()
    with torch.no_grad():
        y = model(x.clone())
    return ((y[:-1] - y[-1:]).abs() > 1e-9).any(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", KEPT)
def test_each_position_reads_its_window_and_nothing_else(case, size):
    nodes, entry, places = followed(KEPT[case], size)
    *_, out = [n for n in nodes if n in places]
    assert places[out] == NCHW and all(isinstance(p, SpatialDims) for p in places.values())
    nodes = [n for n in nodes if n.op != "output"]
    rows, cols = (read(nodes, entry, places, dim) for dim in ("rows", "cols"))
    seen = changed(KEPT[case], size)
    assert seen.shape[1:] == (len(rows), len(cols)) == tuple(value(out).shape[2:])
    for r, c in itertools.product(range(len(rows)), range(len(cols))):
        pixels = seen[:, r, c].nonzero().flatten().tolist()
        assert {divmod(p, size[1]) for p in pixels} == set(itertools.product(rows[r], cols[c]))


OUTSIDE = {  # work -> function of the values that a position reads, with the fill outside the map
    "maximum": (lambda m, x: F.max_pool2d(x, (3, 2), 2, 1), lambda m, v: v.amax((-2, -1))),
    "average": (lambda m, x: F.avg_pool2d(x, 3, 2, 1), lambda m, v: v.mean((-2, -1))),
    "padded": (lambda m, x: F.pad(x, (1, 0, 2, 0), value=-4.5), lambda m, v: v[..., 0, 0]),
    "convolution": (
        lambda m, x: m.wide(x),
        lambda m, v: (
            torch.einsum("bchwij,ocij->bohw", v, m.wide.weight) + m.wide.bias[:, None, None]
        ),
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", OUTSIDE)
def test_positions_outside_count_as_the_fill(case, size):
    work, combine = OUTSIDE[case]
    nodes, _, places = followed(work, size)
    *_, node = [n for n in nodes if n in places]
    model, x = Net(work).eval(), torch.randn(3, C, *size)
    with torch.no_grad():
        y = model(x)
        values = F.pad(x, (border := 8,) * 4, value=windows(node, places[node])[0].fill)
        for dim, way in enumerate(windows(node, places[node]), 2):
            start = border - way.padding + way.stride * torch.arange(y.shape[dim])
            taken = [values.index_select(dim, start + t) for t in range(way.kernel)]
            values = torch.stack(taken, -1)
        torch.testing.assert_close(combine(model, values), y)


@given(*(st.integers(*limits) for limits in [(1, 9), (1, 5), (1, 4), (0, 3), (1, 3)]))
def test_the_length_is_how_many_windows_fit(size, kernel, stride, padding, dilation):
    window = Window(kernel, stride, padding, dilation)
    reach = [r * stride - padding + dilation * (kernel - 1) for r in range(40)]
    fitting = sum(end <= size - 1 + padding for end in reach)
    assert max(window.length(size), 0) == fitting
