"""The mainline of a graph: which values are on it, and where it can be cut."""

import networks
import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite.analysis.mainline import find_mainline
from moe_rewrite.errors import ConversionError, SplitError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import module_paths
from moe_rewrite.ir.ops import op_name

W = 4


class Net(nn.Module):
    """Linear maps a, b, c, and what a test makes of them."""

    def __init__(self, work):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(W, W) for _ in range(3))
        self.register_buffer("table", torch.ones(W))
        self.work = work

    def forward(self, x, y=None):
        return self.work(self, x if y is None else x + y)


def part_added(value, other):
    value[:, :1].add_(other[:, :1] if isinstance(other, torch.Tensor) else other)
    return value


def line_of(work, *given):
    given = given or (torch.zeros(2, 6, W),)
    return find_mainline(program_of(Net(work).eval(), given))


def names(nodes):
    return [op_name(n) for n in nodes]


CHAINS = {
    "one after the other": (
        lambda m, x: m.c(torch.relu(m.a(x))), ["linear", "relu", "linear"],
    ),
    "a residual block is between its joins": (
        lambda m, x: (h := m.a(x)) + m.c(torch.relu(m.b(h))), ["linear", "add"],
    ),
    "branches meet": (
        lambda m, x: m.c(torch.tanh(m.a(x)) * torch.sigmoid(m.b(x))), ["mul", "linear"],
    ),
    "what depends on the input alone is beside": (
        lambda m, x: m.b(m.a(x) * (x > 0).float() + x.exp()), ["linear", "mul", "add", "linear"],
    ),
    "weights are beside": (
        lambda m, x: m.a(x) + (m.b.weight.t() * 2).sum() + m.table, ["linear", "add", "add"],
    ),
    "a write in place is on every later path": (
        lambda m, x: m.b(m.a(x).mul_(2.0).add_(1.0)), ["linear", "mul", "add", "linear"],
    ),
    "a write to a part brings in what it was computed from": (
        lambda m, x: m.c(part_added(m.a(x), m.b(x))), ["linear"],
    ),
    "or nothing else": (lambda m, x: m.c(part_added(m.a(x), 1.0)), ["linear", "linear"]),
    "sizes and dtype of a value are no value": (
        lambda m, x: m.b(m.a(x)) + torch.ones_like(m.c(x)), ["linear", "linear", "add"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_what_every_path_goes_through(case):
    work, expected = CHAINS[case]
    assert names(line_of(work).chain()) == expected


def test_values_on_the_mainline_depend_on_input_and_parameter():
    line = line_of(lambda m, x: m.b(m.a(x).relu() + x.exp() + m.c.weight.sum()) * 2.0)
    assert names(line.positions) == ["linear", "relu", "add", "add", "linear", "mul"]
    places = list(line.positions.values())
    assert places == sorted(places)
    assert all(set(sources) <= set(line.positions) for sources in line.edges.values())


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_cut_points_have_two_to_five_dimensions(rank):
    given = torch.zeros(*(2 for _ in range(rank)), W)[..., 0, :] if rank > 1 else torch.zeros(W)
    line = line_of(lambda m, x: m.b(torch.relu(m.a(x))), given)
    assert len(line.chain()) == 3
    points = line.cut_points()
    assert [line.positions[n] for _, n in points] == [at for at, _ in points]
    assert len(points) == (3 if 2 <= rank <= 5 else 0)


def test_a_cut_point_is_a_float_tensor():
    """Neither the parts of a split nor what was rounded to integers."""
    line = line_of(lambda m, x: m.b(torch.cat(m.a(x).chunk(2, -1)[::-1], -1)))
    assert "chunk" in names(line.chain())
    assert names(n for _, n in line.cut_points()) == ["linear", "cat", "linear"]


def test_the_sink_is_the_output_of_the_longest_computation():
    for flip in (1, -1):
        line = line_of(lambda m, x, flip=flip: [m.a(x), m.c(torch.relu(m.b(x)))][::flip])
        assert names(line.chain()) == ["linear", "relu", "linear"]


@pytest.mark.parametrize(
    ("shapes", "source"),
    [([(2, 3, W)], "x"), ([(2, W)], "x"), ([(W,)], None), ([(2, W), (2, W)], None),
     ([(2, 2, 2, 2, W)], "x"), ([(2, 2, 2, 2, 2, W)], None)],
)  # fmt: skip
def test_the_source_is_the_only_tensor_of_the_call_where_it_could_be_cut(shapes, source):
    line = line_of(lambda m, x: m.b(m.a(x)), *map(torch.zeros, shapes))
    assert line.source() == source and len(line.leaves) == len(shapes)


def test_ids_are_no_features():
    line = line_of(lambda m, x: m.b(m.a(x.float())), torch.zeros(2, 3, W, dtype=torch.long))
    assert line.source() is None


@pytest.mark.parametrize(
    "work", [lambda m, x: x * 2.0, lambda m, x: m.a.weight * 2.0, lambda m, x: m.a(x).argmax(-1)]
)
def test_without_an_output_of_both_there_is_nothing_to_cut(work):
    with pytest.raises(SplitError, match="Net: no output depends on both"):
        line_of(work)


class Stacks(nn.Module):
    """An encoder and a decoder, each with numbered layers."""

    def __init__(self, decode=True):
        super().__init__()
        self.encoder, self.decoder, self.decode = nn.Module(), nn.Module(), decode
        self.embed = nn.Linear(networks.WIDTH, networks.WIDTH)
        for stack in (self.encoder, self.decoder):
            stack.layers = nn.ModuleList(networks.Mlp() for _ in range(2))

    def forward(self, x, y):
        for layer in self.encoder.layers:
            x = layer(x)
        y = self.embed(y)
        for layer in self.decoder.layers:
            y = layer(y + x.mean(1, keepdim=True)) if self.decode else y
        return y if self.decode else x


def test_stacks_are_the_parts_with_numbered_modules_where_there_are_several():
    given = (torch.zeros(2, 6, networks.WIDTH), torch.zeros(2, 5, networks.WIDTH))
    line = find_mainline(program_of(Stacks(), given))
    assert line.stacks() == ["encoder", "decoder"]
    whole, inner = ({n for _, n in line.cut_points(s)} for s in (None, "encoder"))
    assert whole < inner, "without what the decoder reads beside it, the encoder can be cut"
    modules = {path for n in whole for path, _ in module_paths(n)}
    assert "decoder.layers.1" in modules and not any(m.startswith("encoder") for m in modules)
    assert find_mainline(program_of(Stacks(False), given)).stacks() == []
    plain = networks.Network(["Mlp", "Mlp"], tokens=False)
    assert find_mainline(program_of(plain, plain.input(2, 6))).stacks() == []


def test_a_stack_that_is_not_there_has_no_chain():
    assert line_of(lambda m, x: m.a(x)).chain("elsewhere") == []


class Towers(Stacks):
    """Two stacks of equal standing, joined at the end."""

    def forward(self, x, y):
        for one, two in zip(self.encoder.layers, self.decoder.layers, strict=True):
            x, y = one(x), two(y)
        return x.mean(1) @ y.mean(1).t()


def test_the_last_stack_is_the_one_that_the_others_feed():
    given = (torch.zeros(2, 6, networks.WIDTH), torch.zeros(2, 5, networks.WIDTH))
    assert find_mainline(program_of(Stacks(), given)).last_stack() == "decoder"
    assert find_mainline(program_of(Towers(), given)).last_stack() is None


def test_without_one_a_split_has_to_name_a_module():
    given = (torch.zeros(2, 6, networks.WIDTH), torch.zeros(2, 5, networks.WIDTH))
    moe = moe_rewrite.convert(Stacks(), split=1, example_inputs=given)
    assert moe.report.split == "block 1 (decoder.layers.1)"
    assert moe_rewrite.inspect(Towers(), given).must_name
    with pytest.raises(ConversionError, match="several mainlines: name the module"):
        moe_rewrite.convert(Towers(), split=1, example_inputs=given)
