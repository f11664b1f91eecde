"""Convolutional regions that write in place: what becomes plain, and what is refused."""

import pytest
import stages
import torch
from torch import fx

from moe_rewrite.analysis.conv_region import find_region
from moe_rewrite.errors import ConversionError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import mutated, op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run

W = 6


def cut(work):
    return run(
        TO_CUT, program_of(stages.convolutions(work), stages.image(2, 8)), Decisions("stage")
    )


def last(x):
    """A map whose channels come last, as one where they come first."""
    return x.permute(0, 3, 1, 2)


def computed(program, model, x):
    """What the program's graph returns."""
    state = model.state_dict() | program.constants
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    given = (x if of.kind == "user" else state[of.name].clone() for of in inputs)
    with torch.no_grad():
        return fx.Interpreter(program.root, graph=program.graph).run(*given)


IN_PLACE = {  # a stage that writes in place -> how many of the writes become plain
    "activation": (lambda m, x: m.b(torch.relu_(m.a(x))), 1),
    "several": (lambda m, x: m.b(m.norm(m.a(x)).relu_().mul_(2.0).add_(1.0)), 3),
    "read again": (lambda m, x: m.b((y := m.a(x)).relu_()) + y, 1),
    "read before and after": (lambda m, x: (z := m.b(y := m.a(x))) + y.mul_(z), 1),
    "of the entry": (lambda m, x: m.a(x.tanh_()) + x, 1),
    "seen by a view from before": (
        lambda m, x: (y := m.a(x), v := y.permute(0, 2, 3, 1), y.relu_(), last(m.linear(v)))[3],
        1,
    ),
    "seen by parts": (
        lambda m, x: (y := m.a(x), p := y.chunk(2, 1), y.tanh_(), m.b(torch.cat(p[::-1], 1)))[3],
        1,
    ),
    "seen by a view of a view, twice": (
        lambda m, x: (
            y := m.a(x),
            z := y.sin_(),
            v := z.permute(0, 2, 3, 1),
            u := v[..., 1:],
            z.mul_(3.0),
            y + last(v + torch.cat([u, v[..., :1]], -1)),
        )[5],
        2,
    ),
    "of the entry, seen by a view": (
        lambda m, x: (v := x.permute(0, 2, 3, 1), m.a(x.tanh_()) + last(m.linear(v)))[1],
        1,
    ),
    "not seen by a copy": (
        lambda m, x: (y := m.a(x), v := y.permute(0, 2, 3, 1).contiguous(), y.relu_(), last(v) + y)[
            3
        ],
        1,
    ),
    "of a copy": (
        lambda m, x: (y := m.a(x), v := y.permute(0, 2, 3, 1).contiguous(), v.relu_(), last(v) + y)[
            3
        ],
        1,
    ),
    "with its result unused": (lambda m, x: (y := m.a(x), y.mul_(3.0), m.b(y))[2], 1),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_writes_in_place_become_plain_and_values_stay(case):
    work, count = IN_PLACE[case]
    program = cut(work)
    written = [n for n in program.graph.nodes if mutated(n)]
    assert len(written) == count
    x, model = stages.image(5, 8, seed=3), stages.convolutions(work)
    (before,) = computed(program, model, x)
    region = find_region(program, ())
    assert not any(mutated(n) for n in program.graph.nodes) and set(written) <= set(region.nodes)
    (after,) = computed(program, model, x)
    assert torch.equal(after, before)
    with torch.no_grad():
        torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-6)


def a_part(m, x):
    (y := m.a(x))[:, :2].mul_(2.0)
    return m.b(y)


def a_part_and_then_the_whole(m, x):
    (y := m.a(x))[:, :2].mul_(2.0)
    y.relu_()
    return m.b(y)


def a_part_of_the_entry(m, x):
    y = m.a(x)
    x[:, :2].mul_(2.0)
    return m.b(y) + x


def what_a_view_shows(m, x):
    y = m.a(x)
    y.permute(0, 2, 3, 1).relu_()
    return m.b(y)


def over_positions(m, x):
    (y := m.a(x)).cumsum_(2)
    return m.b(y)


def turned(m, x):
    return m.b(m.a(x).transpose_(2, 3)).transpose(2, 3)


LEFT = {
    "a part": (a_part, "mul_ writes in place to slice"),
    "a part and then the whole": (a_part_and_then_the_whole, "mul_ writes in place to slice"),
    "a part of the entry": (a_part_of_the_entry, "mul_ writes in place to slice"),
    "what a view shows": (what_a_view_shows, "relu_ writes in place to permute"),
    "by an operation over positions": (over_positions, "cumsum_ writes in place to conv2d_1"),
    "dimensions": (turned, "transpose_ writes in place to conv2d_1"),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_writes_stay_and_are_refused(case):
    work, reason = LEFT[case]
    program = cut(work)
    with pytest.raises(ConversionError, match=f"{reason}.*shares memory with a map of the region"):
        find_region(program, ("stage",))
    assert any(mutated(n) for n in program.graph.nodes)


def test_a_write_after_the_region_is_none_of_its_own():
    def work(m, x):
        (y := m.b(m.a(x)))[:, :2].mul_(2.0)
        return y

    region = find_region(cut(work), ("stage.0.a", "stage.0.b"))
    assert [op_name(n) for n in region.nodes] == ["conv2d", "conv2d"]
