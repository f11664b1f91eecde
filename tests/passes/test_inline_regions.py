"""no_grad regions: inlined where no gradient could reach them, else kept whole."""

import pytest
import torch
from torch import fx, nn

from moe_rewrite.frontend.capture import program_of
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.inline_regions import REGION, InlineRegions

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.work = nn.Linear(3, 3), work
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x):
        return self.work(self, x)


def of_positions(m, x):
    with torch.no_grad():
        positions = torch.arange(x.shape[0]).outer(m.table)
        angles = positions.cos(), positions.sin()
    return m.linear(x) * angles[0] + angles[1]


def of_the_input(m, x):
    with torch.no_grad():
        scale = x.abs().amax(1, keepdim=True) + 1
    return m.linear(x / scale)


def of_features(m, x):
    x = m.linear(x)
    with torch.no_grad():
        scale = x.abs().amax(1, keepdim=True)
    return x / (1 + scale)


def of_a_weight(m, x):
    with torch.no_grad():
        scale = m.linear.weight.norm()
    return m.linear(x) / scale


def nested(m, x):
    with torch.no_grad():
        scale = m.table + 1
        with torch.enable_grad():
            scale = scale * 2
        scale = scale + 1
    return m.linear(x) * scale


def left(work, mode):
    program = program_of(Net(work), X, mode)
    program = InlineRegions().apply(program, Decisions("auto"))
    return program, [n for n in program.graph.nodes if n.target is REGION]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("work", "regions"), [
    (of_positions, 0), (of_the_input, 0), (of_features, 1), (of_a_weight, 1),
])  # fmt: skip
def test_which_regions_are_left(work, regions, mode):
    assert len(left(work, mode)[1]) == regions


@pytest.mark.parametrize("work", [of_positions, of_the_input, of_features, of_a_weight, nested])
def test_outputs_and_gradients_are_the_models(work):
    model = Net(work)
    program, _ = left(work, "eval")
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for batch in (4, 7):
        x = torch.randn(batch, 3, requires_grad=True)
        given = [named.get(program.inputs[n.name].name, x)
                 for n in program.graph.find_nodes(op="placeholder")]  # fmt: skip
        (ours,) = fx.Interpreter(program.root, graph=program.graph).run(*given)
        theirs = model(x)
        assert torch.equal(ours, theirs)
        a, b = (
            torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (ours, theirs)
        )
        assert all(map(torch.equal, a, b))
