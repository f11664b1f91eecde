"""Channels of a region that no expert may shrink, with the reason."""

import pytest
import stages
import torch
from stages import Work
from torch import nn

from moe_rewrite.analysis.channels import find_channels
from moe_rewrite.analysis.conv_region import find_region
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run

W = 6  # channels of a stage's entry and exit


def conv(a, b, **options):
    return nn.Conv2d(a, b, 1, **options)


def found_in(stage):
    program = program_of(stages.Stage(stage).eval(), stages.image(2, 8))
    program = run(TO_CUT, program, Decisions("stage"))
    region = find_region(program, ("stage",))
    return program, region, find_channels(program, region)


def computed(m, x):
    weight = m.a.weight * 2.0
    return m.b(torch.relu(nn.functional.conv2d(x, weight)))


FIXED = {  # a stage -> its weights' dimensions of which no share can be taken, and the reason
    "grouped": (
        lambda h: Work(
            lambda m, x: m.c(m.b(m.a(x))), a=conv(W, h), b=conv(h, 2 * h, groups=h // 2), c=conv(2 * h, W)
        ),
        {"a.weight", "b.bias", "c.weight"}, "is a grouped convolution",
    ),
    "several filters a channel": (
        lambda h: Work(
            lambda m, x: m.c(m.b(m.a(x))), a=conv(W, h), b=conv(h, 2 * h, groups=h), c=conv(2 * h, W)
        ),
        {"a.weight", "b.bias", "c.weight"}, "is a grouped convolution",
    ),
    "put together": (
        lambda h: Work(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(W, h), b=conv(W, h), c=conv(2 * h, W)
        ),
        {"a.weight", "b.weight", "c.weight"}, "(cat) rearranges channels",
    ),
    "a part": (
        lambda h: Work(lambda m, x: m.b(m.a(x)[:, 2:]), a=conv(W, h), b=conv(h - 2, W)),
        {"a.weight", "b.weight"}, "(slice) rearranges channels",
    ),
    "halves": (
        lambda h: Work(
            lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, 1))), a=conv(W, h), b=conv(h // 2, W)
        ),
        {"a.weight", "b.weight"}, "rearranges channels",
    ),
    "halves that change places": (
        lambda h: Work(
            lambda m, x: m.b(torch.cat(m.a(x).split(h // 2, 1)[::-1], 1)), a=conv(W, h), b=conv(h, W)
        ),
        {"a.weight", "b.weight"}, "rearranges channels",
    ),
    "padded": (
        lambda h: Work(
            lambda m, x: m.b(nn.functional.pad(m.a(x), (1, 1, 0, 0, 1, -1))), a=conv(W, h), b=conv(h, W)
        ),
        {"a.weight", "b.weight"}, "(pad) rearranges channels",
    ),
    "one gate for all": (
        lambda h: Work(
            lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), a=conv(W, h), b=conv(W, 1), c=conv(h, W)
        ),
        {"a.weight", "b.weight", "c.weight"}, "(mul) rearranges channels",
    ),
    "a weight that is computed": (
        lambda h: Work(computed, a=conv(W, h, bias=False), b=conv(h, W)),
        {"b.weight"}, "is computed from a weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("hidden", [8, 12])
@pytest.mark.parametrize("case", FIXED)
def test_channels_that_no_expert_may_shrink(case, hidden):
    make, weights, reason = FIXED[case]
    program, region, channels = found_in(make(hidden))
    out = channels.root(channels.of[region.exit])
    assert channels.hidden() == [out]
    reasons = {}
    for (weight, _), group in channels.dims.items():
        if channels.root(group) != out:
            name = program.inputs[weight.name].name.removeprefix("stage.0.")
            reasons.setdefault(name, set()).add(channels.fixed[channels.root(group)])
    for name in weights:
        (own,) = reasons[name] - {"the region's entry"}
        assert reason in own


def test_a_region_without_weights_has_the_channels_of_its_entry():
    _, region, channels = found_in(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    assert channels.hidden() == [] and channels.dims == {} and channels.counts == {}
    assert {channels.root(channels.of[n]) for n in region.maps()} == set(channels.fixed)
