"""Which dimensions of a value are a map's rows and columns, and which operations lose them."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_rewrite.analysis.spatial import NCHW, SpatialDims, axis, maps, propagate
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.pipeline import run

C = 4


class Net(nn.Module):
    """The layers that a test puts together."""

    def __init__(self, work):
        super().__init__()
        self.conv, self.up = nn.Conv2d(C, C, 3, 1, 1), nn.ConvTranspose2d(C, C, 2, 2)
        self.group, self.linear = nn.GroupNorm(2, C), nn.Linear(C, 6)
        self.register_buffer("table", torch.rand(16, 16))
        self.gate = nn.Parameter(torch.rand(C, C, 6, 6))
        self.work = work

    def forward(self, x):
        return self.work(self, x)


def last(work):
    """Work on a map whose channels come last."""
    return lambda m, x: work(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@cache
def followed(work, size, follow=propagate):
    """Of a graph: its nodes, its map, and the places in it."""
    program = run((Clean(),), program_of(Net(work), torch.zeros(2, C, *size)), Decisions("auto"))
    (entry,) = program.leaves()
    return list(program.graph.nodes), entry, follow(program.graph.nodes, entry)


@pytest.mark.parametrize("size", [(8, 12), (7, 5)])
def test_places_through_a_chain(size):
    """Channels are last between the two permutations."""
    nodes, _, places = followed(
        lambda m, x: m.conv(
            m.linear(torch.relu(x).permute(0, 2, 3, 1))[..., :4].permute(0, 3, 1, 2)
        ),
        size,
    )
    apart = SpatialDims(rows=1, cols=2, channels=3)
    named = [(op_name(n), places[n]) for n in nodes if n in places][1:]
    assert named == [
        ("relu", NCHW), ("permute", apart), ("linear", apart), ("slice", apart), ("permute", NCHW), ("conv2d", NCHW),
    ]  # fmt: skip


REFUSED = {
    "mean": (lambda m, x: x.mean((2, 3), keepdim=True), "mixes all positions"),
    "adaptive pooling": (lambda m, x: F.adaptive_avg_pool2d(x, 2), "mixes all positions"),
    "norm over positions": (lambda m, x: m.group(x), "mixes all positions"),
    "product of maps": (lambda m, x: x @ x.transpose(2, 3), "mixes all positions"),
    "flattened": (lambda m, x: x.flatten(2), "mixes all positions"),
    "sums of rows": (lambda m, x: x.cumsum(2), "is not known to keep positions"),
    "turned": (lambda m, x: x.flip(3), "is not known to keep positions"),
    "larger": (lambda m, x: F.interpolate(x, scale_factor=2), "is not known to keep positions"),
    "transposed convolution": (lambda m, x: m.up(x), "is a transposed convolution"),
    "general transposed convolution": (
        lambda m, x: torch.convolution(
            x, m.up.weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1
        ),
        "is a transposed convolution",
    ),
    "weight of the map": (lambda m, x: F.conv2d(x, x * 2.0), "takes a weight computed from the map"),
    "the map as weight": (lambda m, x: F.conv2d(x, x), "takes a weight computed from the map"),
    "convolution of a moved map": (lambda m, x: m.conv(x.transpose(2, 3)), "dimensions were moved"),
    "ceil_mode": (lambda m, x: F.max_pool2d(x, 2, ceil_mode=True), "pools with ceil_mode=True"),
    "divisor": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
    "average of what is inside": (
        lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "count_include_pad=False",
    ),
    "reflected": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "pads by reflect"),
    "padded batch": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pads the batch"),
    "part of the batch": (lambda m, x: x[1:], "takes a part of the batch"),
    "first rows": (lambda m, x: x[:, :, :-1], "takes a part of the map"),
    "last columns": (lambda m, x: x[..., -2:], "takes a part of the map"),
    "batch moved": (lambda m, x: x.transpose(0, 1), "moves the batch"),
    "softmax over rows": (lambda m, x: x.softmax(2), "works along positions"),
    "norm of rows": (lambda m, x: F.layer_norm(x, x.shape[-1:]), "works along more than channels"),
    "norm of the map": (
        last(lambda m, x: F.layer_norm(x, x.shape[-2:])), "works along more than channels",
    ),
    "split": (lambda m, x: x.chunk(2, 2)[0], "splits the map"),
    "put together along rows": (lambda m, x: torch.cat([x, x], 2), "other than channels"),
    "put together with another value": (
        lambda m, x: torch.cat([x, x.new_zeros(1).expand(x.shape)], 1), "is not known",
    ),
    "laid differently": (lambda m, x: x + x.transpose(2, 3), "different orders of dimensions"),
    "a value for each position": (
        lambda m, x: x * m.table[: x.shape[2], : x.shape[3]], "operand that varies by position",
    ),
    "gate of one position": (
        lambda m, x: m.conv(x) * torch.sigmoid(F.conv2d(x, m.gate)), "the smaller map sigmoid over",
    ),
    "one row for all": (
        lambda m, x: F.avg_pool2d(x, (6, 1)) + m.conv(x), "the smaller map avg_pool2d over",
    ),
    "one position, in place": (
        lambda m, x: m.conv(x).mul_(F.avg_pool2d(x, 6)), "the smaller map avg_pool2d over",
    ),
    "a map of one position on a table": (
        lambda m, x: F.avg_pool2d(x, 6) * m.table, "the smaller map avg_pool2d over",
    ),
    "a fifth dimension": (
        lambda m, x: x * torch.ones(5, 1, 1, 1, 1), "adds dimensions to the map x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_keeps_no_positions_says_why(case):
    work, reason = REFUSED[case]
    nodes, _, places = followed(work, (6, 6))
    *_, found = [places[n] for n in nodes if n in places]
    assert isinstance(found, str) and reason in found


def test_what_follows_a_lost_value_is_lost_for_the_same_reason():
    nodes, _, places = followed(lambda m, x: m.conv(x * x.mean((2, 3), keepdim=True)), (8, 12))
    reasons = {places[n] for n in nodes if op_name(n) in ("mean", "mul", "conv2d")}
    assert reasons == {"mean (mean) mixes all positions"}


def test_what_does_not_depend_on_the_map_has_no_place():
    nodes, entry, places = followed(lambda m, x: F.conv2d(x, m.conv.weight * 2.0), (8, 12))
    assert {op_name(n) for n in places if n is not entry} == {"conv2d"}
    assert len(nodes) > len(places)


WHATEVER = {
    "norm over positions": (lambda m, x: m.group(m.conv(x)), ["conv2d", "group_norm"]),
    "gate": (lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), ["mul"]),
    "a value for each position": (lambda m, x: torch.relu(x + m.table[:8, :12]), ["add", "relu"]),
    "lost and not found": (lambda m, x: torch.relu(x.flip(2)), []),
    "smaller map": (lambda m, x: x * F.avg_pool2d(x, (8, 12)), ["avg_pool2d", "mul"]),
    "a fifth dimension": (lambda m, x: torch.relu(x) * torch.ones(5, 1, 1, 1, 1), ["relu"]),
    "circular padding": (
        lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="circular")), ["pad", "conv2d"],
    ),
    "ceil_mode": (
        lambda m, x: m.conv(F.max_pool2d(x, 3, 2, ceil_mode=True)), ["max_pool2d", "conv2d"],
    ),
    "twice as many positions": (lambda m, x: torch.relu(m.up(x)), ["conv_transpose2d", "relu"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WHATEVER)
def test_maps_are_followed_whatever_else_goes_into_their_values(case):
    work, expected = WHATEVER[case]
    nodes, entry, (places, _) = followed(work, (8, 12), maps)
    assert [op_name(n) for n in nodes if n in places and n is not entry] == expected
    assert set(places.values()) == {NCHW}


def test_a_map_that_is_lost_says_why():
    def work(m, x):
        return torch.relu(F.conv_transpose2d(x, m.up.weight, stride=2, padding=1) * 2.0)

    nodes, _, (places, lost) = followed(work, (8, 12), maps)
    assert len(places) == 1
    (reason,) = {lost[n] for n in nodes if op_name(n) in ("conv_transpose2d", "mul", "relu")}
    assert "makes 14x22 positions of 8x12 with stride [2, 2]: which patches" in reason


ORDERS = st.lists(st.permutations([1, 2, 3]), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(ORDERS, st.booleans())
def test_places_follow_every_permutation(orders, negative):
    """By the sizes, which are all different."""

    def work(m, x):
        for order in orders:
            x = x.permute(0, *(d - 4 if negative else d for d in order)) * 2.0
        return x

    nodes, entry, places = followed(work, (8, 12))
    assert len(places) == 1 + 2 * len(orders)
    for node, place in places.items():
        shape = value(node).shape
        assert (shape[place.rows], shape[place.cols], shape[place.channels]) == (8, 12, C)


def test_the_axis_is_counted_from_the_front():
    works = (lambda m, x: x.softmax(-3), lambda m, x: torch.cat([x, x], -1), lambda m, x: x[:, 1:])
    found = [axis(followed(work, (8, 12))[0][-2]) for work in works]
    assert found == [1, 3, 1]
