"""How a plan's rows are laid out in values after the cut: inferred from sizes, checked by
running."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite import PatchRouter, TokenRouter
from moe_rewrite.analysis.infer_layout import Layouts
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.gate_layout import Flat, OverMap, Rows, Samples, Swapped
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.split import segments

W = 4
TOKEN, SEQUENCE = TokenRouter(), TokenRouter(granularity="sequence")
PATCH = PatchRouter(grid=2, per_expert=1)


class Layer(nn.Module):
    """Work that marks a value on its way, by a sine, and a product."""

    def __init__(self, product, work=None):
        super().__init__()
        self.product, self.work = product, work

    def forward(self, x):
        return self.product(x if self.work is None else self.work(x, torch.sin))


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def marked(model, example):
    """The program, its deep nodes, and the value that is marked."""
    program = run(TO_CUT, program_of(model, example), Decisions(1))
    _, deep = segments(program)
    (sine,) = [n for n in deep if op_name(n) == "sin"]
    (rows,) = sine.all_input_nodes
    return program, deep, rows


def of_rows(work, router, shape=(2, 6, W)):
    model = Net(Layer(nn.Linear(W, W)), Layer(nn.LazyLinear(W), work))
    model(torch.zeros(shape))
    program, deep, rows = marked(model, torch.zeros(shape))
    return Layouts(program, deep, router).of_rows(rows, rows)


LINES = {  # how a value is marked -> layouts of gates of positions, and of samples
    "as it is": (lambda x, mark: mark(x), Rows(3), Samples(3)),
    "with heads": (lambda x, mark: mark(x.unflatten(-1, (2, 2))), Rows(4), Samples(4)),
    "length first": (lambda x, mark: mark(x.transpose(0, 1)), Swapped(3), Swapped(3)),
    "length first, with heads": (
        lambda x, mark: mark(x.transpose(0, 1).unflatten(-1, (2, 2))), Swapped(4), Swapped(4),
    ),
    "merged": (lambda x, mark: mark(x.reshape(-1, W)), Flat(False), Flat(False)),
    "merged, then doubled": (lambda x, mark: mark(x.flatten(0, 1) * 2.0), Flat(False), Flat(False)),
    "merged, length first": (
        lambda x, mark: mark(x.transpose(0, 1).reshape(-1, W)), Flat(True), Flat(True),
    ),
    "heads first": (
        lambda x, mark: mark(x.unflatten(-1, (2, 2)).transpose(1, 2)), None, Samples(4),
    ),
    "pooled": (lambda x, mark: mark(x.mean(1)), None, Samples(2)),
    "a part": (lambda x, mark: mark(x[:, 1:]), None, Samples(3)),
    "over positions": (lambda x, mark: mark(x.transpose(1, 2)).transpose(1, 2), None, Samples(3)),
    "merged and mixed": (lambda x, mark: mark(x.reshape(-1, W).cumsum(0)), None, None),
    "of the whole batch": (lambda x, mark: mark(x.mean(0)), None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_layouts_of_a_sequence(case):
    work, *expected = LINES[case]
    for router, layout in zip((TOKEN, SEQUENCE), expected, strict=True):
        found = of_rows(work, router)
        if layout is None:
            assert "has rows that are not the plan's" in found
        else:
            assert found == layout


@pytest.mark.parametrize("case", [c for c in LINES if LINES[c][1] is not None])
def test_each_row_meets_the_gate_of_its_position(case):
    """Positions hold their number, and gates too: so they are equal wherever the rows lie."""
    work, layout, _ = LINES[case]
    numbers, seen = torch.arange(1.0, 16).view(3, 5, 1), []
    work(numbers.expand(3, 5, W), lambda value: seen.append(value) or value)
    (value,) = seen
    shaped = layout.broadcast(numbers, (3, 5), 0)
    assert torch.equal(shaped.expand_as(value) * (2.0 if "doubled" in case else 1.0), value)


@pytest.mark.parametrize("case", [c for c in LINES if LINES[c][2] is not None])
def test_each_row_meets_the_gate_of_its_sample(case):
    work, _, layout = LINES[case]
    numbers, seen = torch.arange(1.0, 4).view(3, 1, 1), []
    work(numbers.expand(3, 5, W), lambda value: seen.append(value) or value)
    (value,) = seen
    shaped = layout.broadcast(numbers, (3, 5), 0)
    assert torch.equal(shaped.expand_as(value) * (2.0 if "doubled" in case else 1.0), value)


@pytest.mark.parametrize("router", [TOKEN, SEQUENCE])
def test_without_positions_gates_are_of_samples(router):
    assert of_rows(lambda x, mark: mark(x), router, (2, W)) == Samples(2)
    heads = of_rows(lambda x, mark: mark(x.unflatten(-1, (2, 2))), router, (2, W))
    assert heads == Samples(3)


def of_image(work, router, size=(8, 12)):
    """Layouts of the marked value as rows, as a map, and as a map with its channels last."""
    shallow, last = Layer(nn.Conv2d(3, W, 3, 1, 1)), Layer(nn.Conv2d(W, W, 1), work)
    program, deep, rows = marked(Net(shallow, last), torch.zeros(2, 3, *size))
    layouts = Layouts(program, deep, router)
    return layouts.of_rows(rows, rows), layouts.of_map(rows, rows), layouts.of_map(rows, rows, True)


def channels_last(x, mark):
    return mark(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MAPS = {
    "the cut itself": (lambda x, mark: mark(x), (8, 12)),
    "pooled by windows": (lambda x, mark: mark(F.max_pool2d(x, 2)), (4, 6)),
    "padded": (lambda x, mark: mark(F.pad(x, (1, 1, 0, 0))), (8, 14)),
    "with values of the whole map": (
        lambda x, mark: mark(x * torch.sigmoid(x.mean((2, 3), keepdim=True))), (8, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPS)
def test_patches_lie_over_maps(case):
    work, size = MAPS[case]
    rows, plain, last = of_image(work, PATCH)
    assert plain == OverMap(False, size) and last == OverMap(True, size)
    assert "has no patches of the map at the cut" in rows


def test_patches_lie_over_maps_with_channels_last_as_over_rows():
    rows, plain, _ = of_image(channels_last, PATCH)
    assert rows == OverMap(True, (8, 12))
    assert plain == "its input does not lie over the map at the cut"


@pytest.mark.parametrize(
    "work",
    [
        lambda x, mark: x * mark(x.mean((2, 3), keepdim=True)),
        lambda x, mark: mark(x.flatten(2)).unflatten(2, (8, 12)),
        lambda x, mark: mark(x.transpose(1, 2)).transpose(1, 2),
    ],
)
def test_patches_do_not_lie_over_other_values(work):
    rows, plain, _ = of_image(work, PATCH)
    assert "has no patches" in rows
    assert plain.startswith("its input does not lie over the map at the cut")


@pytest.mark.parametrize("router", [TOKEN, SEQUENCE])
def test_one_gate_a_sample_fits_every_value_of_a_map(router):
    rows, plain, last = of_image(lambda x, mark: mark(x), router)
    assert (rows, plain, last) == (Samples(4), OverMap(False, None), OverMap(True, None))
    rows, *_ = of_image(lambda x, mark: x * mark(x.mean((2, 3)))[..., None, None], router)
    assert rows == Samples(2)


def test_patches_of_a_sequence_are_its_rows():
    assert of_rows(lambda x, mark: mark(x), PATCH) == Rows(3)


@pytest.mark.parametrize("router", [TOKEN, PATCH])
def test_shifted_rows_have_the_gates_of_where_they_lie_at_fixed_sizes_too(router):
    def shifted(x, mark):
        return mark(F.pad(x, (0, 0, 1, -1)))

    assert of_rows(shifted, router) == Rows(3)
    tokens = Layer(nn.Linear(W, W), lambda x, _: x.flatten(2).transpose(1, 2))
    program, deep, rows = marked(
        Net(tokens, Layer(nn.Linear(W, W), shifted)), torch.zeros(2, W, 2, 3)
    )
    assert Layouts(program, deep, router).of_rows(rows, rows) == Rows(3)
