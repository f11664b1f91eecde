"""Cleaning a captured graph: what goes, what stays, and that it computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean
from moe_rewrite.passes.pipeline import run

WIDTH = 4


class Net(nn.Module):
    """A linear map, then what a test is of."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.body = nn.Linear(WIDTH, WIDTH), body

    def forward(self, x):
        return self.body(self, self.linear(x))


def made(body, mode="eval"):
    model = Net(body)
    return model, program_of(model, torch.zeros(2, 6, WIDTH), mode)


def ops(program):
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function"]


def outputs(program, model, *given):
    users, state = iter(given), model.state_dict() | program.constants
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    values = [next(users) if i.kind == "user" else state[i.name] for i in inputs]
    torch.manual_seed(3)
    return fx.Interpreter(program.root, graph=program.graph).run(*values)


def cleaned(body, mode="eval"):
    """Operators before and after; both graphs give the same, on sizes unlike the example's."""
    model, program = made(body, mode)
    before = ops(program)
    given = [torch.randn(b, s, WIDTH) for b, s in ((2, 6), (5, 3), (1, 1))]
    expected = [outputs(program, model, x) for x in given]
    program = run((Clean(),), program, Decisions(0))
    for x, wanted in zip(given, expected, strict=True):
        for a, b in zip(outputs(program, model, x), wanted, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    assert program.numerics[-1] == ("clean", "exact")
    return before, ops(program)


GOES = {
    "a cast to the same dtype": lambda m, x: torch.relu(x.to(torch.float32)),
    "a move to the same device": lambda m, x: torch.relu(x.to("cpu")),
    "dropout in evaluation": lambda m, x: torch.relu(F.dropout(x, 0.5, False)),
    "dropout of channels in evaluation": lambda m, x: torch.relu(F.dropout1d(x, 0.5, False)),
    "alpha dropout in evaluation": lambda m, x: torch.relu(F.alpha_dropout(x, 0.5, False)),
    "a slice of everything": lambda m, x: torch.relu(x[:, :]),
    "several after one another": lambda m, x: torch.relu(x[:].to(torch.float32)[:, 0:].float()),
    "what nobody reads": lambda m, x: (x.sin().exp(), torch.relu(x))[1],
    "what passes on another that does": lambda m, x: torch.relu(x.float()[:]).float(),
}


@pytest.mark.parametrize("case", GOES)
def test_what_hands_on_its_input_goes(case):
    before, after = cleaned(GOES[case])
    assert len(before) > 2 and after == ["linear", "relu"]


STAYS = {
    "a cast to another dtype": ("to", lambda m, x: x.to(torch.float64)),
    "a copy": ("to", lambda m, x: x.to(torch.float32, copy=True).add_(1) + x),
    "another memory format": (
        "to",
        lambda m, x: x[None].to(torch.float32, memory_format=torch.channels_last),
    ),
    "a clone": ("clone", lambda m, x: x.clone().add_(1) + x),
    "a part from the start": ("slice", lambda m, x: x[:, :1]),
    "a part from the end": ("slice", lambda m, x: x[..., 1:]),
    "each second": ("slice", lambda m, x: x[..., ::2]),
    "the last": ("slice", lambda m, x: x[..., -1:]),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_gives_something_else_stays(case):
    name, body = STAYS[case]
    before, after = cleaned(body)
    assert name in before and name in after


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_goes_in_evaluation_alone(mode):
    _, after = cleaned(lambda m, x: F.dropout(x, 0.5, m.training), mode)
    assert ("dropout" in after) == (mode == "train")


def test_asserts_go_and_what_is_computed_for_them_alone():
    class Data(nn.Module):
        """A size that depends on values, which capture guards."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, n):
            size = n.item()
            torch._check(size >= 0)
            torch._check(size <= x.shape[1])
            return self.linear(x[:, :size])

    model = Data()
    program = program_of(model, (torch.zeros(2, 6, WIDTH), torch.tensor(4)))
    checks = {"_assert_scalar", "sym_constrain_range_for_size", "_assert_tensor_metadata"}
    assert checks & set(ops(program))
    program = run((Clean(),), program, Decisions(0))
    assert not checks & set(ops(program)) and "item" in ops(program)
    x = torch.randn(3, 5, WIDTH)
    (y,) = outputs(program, model, x, torch.tensor(2))
    torch.testing.assert_close(y, model(x, torch.tensor(2)).detach())


def test_random_and_in_place_operations_stay_though_nobody_reads_them():
    """They change what other operations give."""

    def body(m, x):
        y = x * 1.0
        y.add_(1.0)
        F.dropout(x, 0.5, m.training)
        return y + torch.rand_like(y)

    before, after = cleaned(body, "train")
    assert after.count("dropout") == 1 and "add" in after and "rand_like" in after
    assert before == after


def test_weights_that_nobody_reads_lose_their_placeholder_and_users_keep_theirs():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, y):
            self.spare(x)
            return self.used(x).to(torch.float32)

    given = (torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))
    program = run((Clean(),), program_of(Spare(), given), Decisions(0))
    placeholders = {n.name for n in program.graph.find_nodes(op="placeholder")}
    assert set(program.inputs) == placeholders
    assert program.names("user") == {"x", "y"}, "the call still takes them"
    assert {"used.weight", "used.bias"} <= program.names("weight")
    assert ops(program) == ["linear"]


def test_recurrent_layers_stay_in_evaluation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(4, 4, num_layers=2, dropout=0.5)

        def forward(self, x):
            return self.layer(x)[0]

    program = Clean().apply(program_of(Net(), torch.zeros(5, 2, 4)), Decisions(1))
    assert "lstm" in {op_name(n) for n in program.graph.nodes}
