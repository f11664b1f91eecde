"""Which calls one captured graph may serve: decided by contents, never by how they print."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite import MoeRewriteError
from moe_rewrite.converted.graphs.call import Call
from moe_rewrite.ir.structural_key import structural_key


class Shifted(nn.Module):
    """Layers that add a constant of the call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, shift=None, scale=1.0):
        for layer in self.layers:
            x = torch.relu(layer(x)) * scale
        return x if shift is None else x + float(np.asarray(shift, dtype=np.float64).sum())


def signature(arguments):
    return Call.of(arguments, "eval", (torch.device("cpu"), torch.float32)).key


@pytest.fixture(scope="module")
def converted():
    model = Shifted().eval()
    return model, moe_rewrite.convert(model, split=1, example_inputs=torch.randn(2, 5, 8))


def long(at):
    """2,000 numbers, of which Python prints the first and the last three."""
    numbers = np.zeros(2000)
    numbers[at] = 12.0
    return numbers


@pytest.mark.parametrize(
    "shifts",
    [
        [np.zeros(2000), long(1000)],
        [long(3), 2 * long(3)],
        [[1.0, 2.0], (1.0, 2.0), [1, 2], [2.0, 1.0]],
        [np.float32(0.1), np.float64(0.1), 0.1],
    ],
)
def test_constants_that_differ_get_graphs_of_their_own(converted, shifts):
    model, moe = converted
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        for shift in (*shifts, *shifts):
            torch.testing.assert_close(moe(x, shift=shift), model(x, shift=shift))


def test_an_array_that_was_changed_in_place_is_another_constant(converted):
    model, moe = converted
    x, shift = torch.randn(3, 4, 8), np.zeros(2000)
    with torch.no_grad():
        for at in range(0, 1500, 500):
            shift[at] += 3.0
            torch.testing.assert_close(moe(x, shift=shift), model(x, shift=shift))


class Setting:
    """Prints the same whatever it holds."""

    def __init__(self, number):
        self.number = number

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.number, dtype)

    def __repr__(self):
        return "Setting()"


@pytest.mark.parametrize("shift", [Setting(1), [Setting(1)], {"a": Setting(1)}, object(), {1, 2}])
def test_a_constant_without_content_is_refused(converted, shift):
    _, moe = converted
    with pytest.raises(MoeRewriteError, match=r"shift holds a (Setting|object|set).*pass tensors"):
        moe(torch.randn(3, 4, 8), shift=shift)


@pytest.mark.parametrize(
    ("a", "b"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), ((1, 2), [1, 2]), ({"a": 1}, {"a": 2}),
     (torch.float32, torch.float64), (b"1", "1"), (np.zeros((2, 3)), np.zeros((3, 2))),
     (np.zeros(2, np.int32), np.zeros(2, np.float32))],
)  # fmt: skip
def test_values_of_another_kind_are_others(a, b):
    def key(value):
        return signature({"x": torch.ones(2, 3), "c": value})

    assert key(a) != key(b) and key(a) == key(a)


def test_a_nan_is_one_constant():
    keys = {signature({"c": math.nan}), signature({"c": float("nan")})}
    assert len(keys) == 1


def test_tensors_in_containers_of_another_structure_are_another_call():
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    calls = [
        {"x": [a, b]},
        {"x": [a]},
        {"x": (a, b)},
        {"x": {"a": a, "b": b}},
        {"x": {"a": a, "c": b}},
    ]
    assert len({signature(call) for call in calls}) == len(calls)


class Printed(float):
    """A number that prints as one digit."""

    def __repr__(self):
        return "1.0"


def graph(number, *, swapped=False):
    made = torch.fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    total = made.call_function(torch.add, (y, x) if swapped else (x, y))
    made.output(made.call_function(torch.mul, (total, number)))
    return made


def test_code_is_shared_by_equal_graphs_alone():
    assert structural_key(graph(1.0)) == structural_key(graph(1.0))
    others = [graph(1), graph(True), graph(Printed(3.0)), graph(1.0, swapped=True), graph("1.0")]
    assert len({structural_key(g) for g in [graph(1.0), *others]}) == 6
