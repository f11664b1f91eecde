"""Groups of channels: which dimensions of weights belong together, and that a share runs."""

from functools import cache

import pytest
import stages
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import Work
from torch import fx, nn
from torch.func import functional_call

from moe_rewrite.analysis.channels import Channels, find_channels
from moe_rewrite.analysis.conv_region import find_region
from moe_rewrite.errors import ConversionError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import argument, op_name, set_argument
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run

W = 6  # channels of a stage's entry and exit


def conv(a, b, size=1, **options):
    return nn.Conv2d(a, b, size, padding=size // 2, **options)


def last(layers):
    return lambda m, x: layers(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def scaled(m, x):
    return m.b(m.a(x) * m.scale + m.shift)


CASES = {  # hidden channels -> a stage; the groups of its weights' dimensions
    "convolutions": (
        lambda h: Work(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(W, h, 3), b=conv(h, W)),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "norm and activation with weights": (
        lambda h: Work(
            lambda m, x: m.b(m.act(m.norm(m.a(x)))),
            a=conv(W, h, bias=False), norm=nn.BatchNorm2d(h), act=nn.PReLU(h), b=conv(h, W, 3),
        ),
        {"a.weight": ("p", "in"), "norm.weight": "p", "norm.bias": "p", "norm.running_mean": "p",
         "norm.running_var": "p", "act.weight": "p", "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "residual": (
        lambda h: Work(lambda m, x: x + m.b(torch.tanh(m.a(x))), a=conv(W, h), b=conv(h, W)),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("in", "p"), "b.bias": ("in",)},
    ),
    "two hidden groups": (
        lambda h: Work(
            lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
            a=conv(W, h), b=conv(h, h + 2, 3), c=conv(h + 2, W),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("q", "p"), "b.bias": "q",
         "c.weight": ("out", "q"), "c.bias": ("out",)},
    ),
    "depthwise": (
        lambda h: Work(
            lambda m, x: m.c(m.b(m.a(x)).relu()),
            a=conv(W, h), b=conv(h, h, 3, groups=h), c=conv(h, W),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": "p", "b.bias": "p",
         "c.weight": ("out", "p"), "c.bias": ("out",)},
    ),
    "branches that are added": (
        lambda h: Work(
            lambda m, x: m.c(torch.relu(m.a(x)) * torch.sigmoid(m.b(x))),
            a=conv(W, h), b=conv(W, h, 3), c=conv(h, W),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("p", "in"), "b.bias": "p",
         "c.weight": ("out", "p"), "c.bias": ("out",)},
    ),
    "pooled": (
        lambda h: Work(
            lambda m, x: m.b(nn.functional.max_pool2d(m.a(x), 2)[:, :, ::2]), a=conv(W, h), b=conv(h, W)
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "padded positions": (
        lambda h: Work(
            last(lambda m, x: m.b(nn.functional.pad(m.a(x), (0, 0, 1, 0, 0, 2)))),
            a=nn.Linear(W, h), b=nn.Linear(h, W),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "one slope for all": (
        lambda h: Work(
            lambda m, x: m.c(m.act(m.b(m.act(m.a(x))))),
            a=conv(W, h), b=conv(h, h + 2), c=conv(h + 2, W), act=nn.PReLU(),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("q", "p"), "b.bias": "q",
         "c.weight": ("out", "q"), "c.bias": ("out",)},
    ),
    "channels last": (
        lambda h: Work(
            last(lambda m, x: m.b(nn.functional.gelu(m.a(x)))), a=nn.Linear(W, h), b=nn.Linear(h, W)
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "scales": (
        lambda h: Work(
            scaled, a=conv(W, h), b=conv(h, W), scale=nn.Parameter(torch.rand(h, 1, 1)),
            shift=nn.Parameter(torch.rand(1, h, 1, 1)),
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "scale": "p", "shift": (None, "p"),
         "b.weight": ("out", "p"), "b.bias": ("out",)},
    ),
    "one layer used twice": (
        lambda h: Work(
            lambda m, x: m.c(m.b(torch.relu(m.b(m.a(x))))), a=conv(W, h), b=conv(h, h), c=conv(h, W)
        ),
        {"a.weight": ("p", "in"), "a.bias": "p", "b.weight": ("p", "p"), "b.bias": "p",
         "c.weight": ("out", "p"), "c.bias": ("out",)},
    ),
}  # fmt: skip


@cache
def stage(case, hidden):
    torch.manual_seed(0)
    model = stages.Stage(CASES[case][0](hidden)).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def found_in(case, hidden):
    program = run(TO_CUT, program_of(stage(case, hidden), stages.image(2, 8)), Decisions("stage"))
    region = find_region(program, ("stage",))
    return program, region, find_channels(program, region)


def named(program, region, channels):
    """Groups by a letter, those of the entry and of the exit by their names."""
    names = {}
    for name, node in (("in", region.entry), ("out", region.exit)):
        names.setdefault(channels.root(channels.of[node]), name)
    letters = iter("pqrs")
    found = {}
    for (weight, dim), group in channels.dims.items():
        root = channels.root(group)
        letter = names[root] if root in names else names.setdefault(root, next(letters))
        of = found.setdefault(program.inputs[weight.name].name.removeprefix("stage.0."), {})
        of[dim] = letter
    return found


@pytest.mark.parametrize("hidden", [8, 5])
@pytest.mark.parametrize("case", CASES)
def test_dimensions_of_weights_by_their_group(case, hidden):
    program, region, channels = found_in(case, hidden)
    expected = {n: {i: g for i, g in enumerate(of) if g} for n, of in CASES[case][1].items()}
    assert named(program, region, channels) == expected
    shapes = stage(case, hidden).state_dict()
    for (weight, dim), group in channels.dims.items():
        size = shapes[program.inputs[weight.name].name].shape[dim]
        assert channels.sizes[channels.root(group)] == size
    entry, exit_ = (channels.root(channels.of[n]) for n in (region.entry, region.exit))
    assert channels.fixed == {entry: "the region's entry"}
    letters = {g for of in expected.values() for g in of.values()} - {"in"}
    assert len(channels.hidden()) == len(letters) and entry not in channels.hidden()
    assert (exit_ in channels.hidden()) == ("out" in letters)


def shared(region, program, channels, state, kept, x):
    """The region with the first channels of every group that may shrink."""
    values = {region.entry: x}
    for node in region.nodes:
        for weight in node.all_input_nodes:
            if weight.op == "placeholder":
                tensor = state[program.inputs[weight.name].name]
                for dim in range(tensor.ndim):
                    group = channels.dims.get((weight, dim))
                    size = None if group is None else kept.get(channels.root(group))
                    tensor = tensor if size is None else tensor.narrow(dim, 0, size)
                values[weight] = tensor
        if node in channels.counts and channels.root(channels.counts[node]) in kept:
            assert op_name(node) == "conv2d" and argument(node, "groups") > 1
            set_argument(node, "groups", kept[channels.root(channels.counts[node])])
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
    return values[region.exit]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_share_of_the_channels_computes_as_if_the_rest_were_not_read(case, data):
    """Compared with the dense stage, with zeros in the weights that read the other channels."""
    program, region, channels = found_in(case, 8)
    kept = {g: data.draw(st.integers(1, channels.sizes[g])) for g in channels.hidden()}
    model, x = stage(case, 8), stages.image(3, 10, seed=2, channels=W)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    silent = {n: t.clone() for n, t in state.items()}
    for (weight, dim), group in channels.dims.items():
        tensor = silent[program.inputs[weight.name].name]
        if dim == 1 and tensor.shape[0] > 1:
            tensor[:, kept.get(channels.root(group), tensor.shape[1]) :] = 0.0
    exit_ = kept.get(channels.root(channels.of[region.exit]), W)
    with torch.no_grad():
        inside = {n.removeprefix("stage."): t for n, t in silent.items() if n.startswith("stage.")}
        expected = functional_call(model.stage, inside, (x,))[:, :exit_]
        torch.testing.assert_close(shared(region, program, channels, state, kept, x), expected)


def test_nodes_with_a_number_of_channels_as_argument():
    layers = {"a": nn.Linear(W, 8), "norm": nn.LayerNorm(8), "b": nn.Linear(8, W)}
    torch.manual_seed(0)
    model = stages.Stage(Work(last(lambda m, x: m.b(m.norm(m.a(x)))), **layers)).eval()
    program = run(TO_CUT, program_of(model, stages.image(2, 8)), Decisions("stage"))
    region = find_region(program, ("stage",))
    channels = find_channels(program, region)
    counts = {op_name(n): channels.root(g) for n, g in channels.counts.items()}
    (hidden,) = set(channels.hidden()) - {channels.root(channels.of[region.exit])}
    assert counts == {"layer_norm": hidden} and channels.sizes[hidden] == 8


def test_joined_groups_are_one_and_fixed_where_either_is():
    channels = Channels()
    a, b, c, d = (channels.new(size) for size in (4, 4, 4, 5))
    channels.fix(b, "no")
    assert channels.join(a, b) == channels.root(b) == a and channels.fixed[a] == "no"
    channels.join(c, b)
    assert channels.root(a) == channels.root(c) == channels.join(a, c) and a != d
    channels.of = dict.fromkeys("x", a) | dict.fromkeys("y", d)
    assert channels.hidden() == [d]
    with pytest.raises(ConversionError, match="channels of 4 and 5 are joined"):
        channels.join(a, d)
