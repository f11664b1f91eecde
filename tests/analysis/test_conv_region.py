"""Convolutional regions: where they begin and end, what belongs to them, and what is refused."""

import pytest
import stages
import torch
import torch.nn.functional as F
from torch import fx, nn

from moe_rewrite.analysis.conv_region import find_region, map_size
from moe_rewrite.analysis.spatial import NCHW, SpatialDims
from moe_rewrite.errors import ConversionError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run

W = 6


def cut(work, size=8, split="stage"):
    return run(
        TO_CUT, program_of(stages.convolutions(work), stages.image(2, size)), Decisions(split)
    )


def names(nodes):
    return [op_name(n) for n in nodes]


def recorded(program, model, x):
    """The value of every node."""
    state = model.state_dict() | program.constants
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    given = (x if of.kind == "user" else state[of.name].clone() for of in inputs)
    made = fx.Interpreter(program.root, garbage_collect_values=False, graph=program.graph)
    with torch.no_grad():
        made.run(*given)
    return made.env


FOUND = {  # work -> the region's operations, when it goes as far as it can
    "to the mean": (lambda m, x: m.b(torch.relu(m.a(x))), ["conv2d", "relu", "conv2d"]),
    "residual": (lambda m, x: x + m.b(m.norm(m.a(x))), ["conv2d", "batch_norm", "conv2d", "add"]),
    "branches": (
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))),
        ["conv2d", "conv2d", "sigmoid", "mul", "conv2d"],
    ),
    "with a weight that is computed": (
        lambda m, x: F.conv2d(x, m.a.weight * 2.0, padding=1) + m.b.bias.view(-1, 1, 1),
        ["mul", "conv2d", "view", "add"],
    ),
    "channels last in between": (
        lambda m, x: m.a(m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        ["permute", "linear", "permute", "conv2d"],
    ),
    "up to a norm over positions": (lambda m, x: m.b(m.group(torch.relu(m.a(x)))), ["conv2d", "relu"]),
    "up to a gate over positions": (
        lambda m, x: (y := m.b(m.a(x))) * y.mean((2, 3), keepdim=True), ["conv2d", "conv2d"],
    ),
    "not to where dimensions were moved": (
        lambda m, x: m.linear(m.a(x).permute(0, 2, 3, 1)).cumsum(1).permute(0, 3, 1, 2), ["conv2d"],
    ),
    "not to where another value is read": (
        lambda m, x: m.c((y := m.a(x)) + m.b(y) + y.flip(2)), ["conv2d"],
    ),
}  # fmt: skip

ENDS = {
    "up to a norm over positions": "group_norm (group_norm) mixes all positions",
    "not to where dimensions were moved": "cumsum (cumsum) is not known to keep positions",
    "not to where another value is read": "flip (flip) is not known to keep positions",
}


@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize("case", FOUND)
def test_from_the_cut_as_far_as_it_goes(case, size):
    work, expected = FOUND[case]
    program = cut(work, size)
    region = find_region(program, ())
    assert region.name == "stage" and region.entry.name == program.cut.node
    assert names(region.nodes) == expected and region.exit is region.nodes[-1]
    assert region.places[region.exit] == region.places[region.entry] == NCHW
    assert region.maps() == [n for n in region.nodes if n in region.places]
    assert all(isinstance(p, SpatialDims) for p in region.places.values())
    order = list(program.graph.nodes)
    assert [*map(order.index, region.nodes)] == sorted(map(order.index, region.nodes))
    ends, _, hint = region.ends.partition(". ")
    assert ends == ENDS.get(case, "mean (mean) mixes all positions")
    assert ("statistics='patches'" in hint) == case.startswith("up to")
    assert map_size(region.entry) == map_size(region.exit) == (size, size)


@pytest.mark.parametrize("case", FOUND)
def test_its_nodes_give_the_exit_from_the_entry_and_weights(case):
    """On another batch than the example's."""
    program, model = cut(FOUND[case][0]), stages.convolutions(FOUND[case][0])
    region = find_region(program, ())
    seen = recorded(program, model, stages.image(5, 8, seed=2))
    with torch.no_grad():
        weights = {s for n in region.nodes for s in n.all_input_nodes if s.op == "placeholder"}
        values = {n: seen[n] for n in (region.entry, *weights)}
        for node in region.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    assert torch.equal(values[region.exit], seen[region.exit])


NAMED = {  # modules -> their operations, in a chain of several
    ("stage.0.a",): ["conv2d"],
    ("stage.0.norm",): ["batch_norm"],
    ("stage.0.a", "stage.0.b"): ["conv2d", "batch_norm", "relu", "conv2d"],
    ("stage.0.b", "stage.0.norm"): ["batch_norm", "relu", "conv2d"],
    ("stage.0",): ["conv2d", "batch_norm", "relu", "conv2d", "tanh"],
}


@pytest.mark.parametrize("modules", NAMED, ids=" ".join)
def test_named_modules_with_the_operations_between_them(modules):
    program = cut(lambda m, x: torch.tanh(m.b(torch.relu(m.norm(m.a(x))))))
    region = find_region(program, modules)
    assert names(region.nodes) == NAMED[modules] and region.name == ", ".join(modules)
    assert region.entry in region.nodes[0].all_input_nodes and region.ends == ""
    (first, *_), chain = region.maps(), [n for n in program.graph.nodes if value(n) is not None]
    assert chain.index(region.entry) < chain.index(first)


REFUSED = {  # work, modules -> why
    "nothing keeps positions": (lambda m, x: m.a(m.group(x)), (), "no region starts at the cut"),
    "unknown": (lambda m, x: m.a(x), ("stage.7",), "region='stage.7': no module of this name works"),
    "before the cut": (lambda m, x: m.a(x), ("trunk",), "region='trunk': no module of this name works"),
    "without a map": (lambda m, x: m.a(x), ("head",), "starts at mean, which is no feature map"),
    "two entries": (lambda m, x: m.c(m.a(x)) + m.c(m.b(x)), ("stage.0.c",), "expected one entry, found 2"),
    "a size": (lambda m, x: m.a(x) / x.shape[0], ("stage",), "reads x besides relu: expected one entry"),
    "two exits": (lambda m, x: m.a(x) + m.b(x), ("stage.0.a", "stage.0.b"), "expected one exit, found 2"),
    "holds a norm over positions": (
        lambda m, x: m.b(m.group(m.a(x))), ("stage.0.a", "stage.0.b"),
        "mixes all positions, which a region cannot hold",
    ),
    "is read inside": (
        lambda m, x: m.b(y := m.a(x)) + y, ("stage.0.a", "stage.0.b"), "expected one exit, found 2",
    ),
    "ends with moved dimensions": (
        lambda m, x: m.linear(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        ("stage.0.a", "stage.0.linear"), "whose dimensions were moved",
    ),
    "starts with moved dimensions": (
        lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        ("stage.0.linear",), "works along more than channels, which a region cannot hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case):
    work, modules, match = REFUSED[case]
    with pytest.raises(ConversionError, match=match):
        find_region(cut(work), modules)


def test_a_cut_must_carry_a_map():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    program = run(TO_CUT, program_of(model, torch.zeros(2, 4)), Decisions(1))
    with pytest.raises(ConversionError, match="the cut carries .*x4, not a feature map"):
        find_region(program, ())


class Two(nn.Module):
    """Reads a second map after the cut."""

    def __init__(self):
        super().__init__()
        self.trunk, self.stage = nn.Conv2d(3, W, 1), nn.Conv2d(W, W, 1)
        self.head = nn.Conv2d(W, W, 1)

    def forward(self, x, y):
        return self.head(torch.tanh(self.stage(torch.relu(self.trunk(x))) + y)).mean((2, 3))


def test_another_argument_ends_a_region():
    given = (torch.zeros(2, 3, 8, 8), torch.zeros(2, W, 1, 1))
    program = run(TO_CUT, program_of(Two(), given), Decisions("stage"))
    region = find_region(program, ())
    assert names(region.nodes) == ["conv2d"] and "reads y besides" in region.ends
    with pytest.raises(ConversionError, match="reads y besides .*expected one entry"):
        find_region(program, ("stage", "head"))


def test_a_map_of_open_size_has_none():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return x.sum() + mask.sum((2, 3))

    program = program_of(Masked(), (torch.zeros(2, 3, 8, 12), torch.zeros(2, 3, 8, 12)))
    image, mask = program.leaves()
    assert map_size(image) == (8, 12)
    with pytest.raises(ConversionError, match="mask: the map's size is not fixed"):
        map_size(mask)
