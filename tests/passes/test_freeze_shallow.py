"""The shallow segment in eval mode: what is turned off there, and that nothing after the cut is."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from moe_rewrite.errors import CaptureError
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import argument, op, op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.freeze_shallow import FreezeShallow
from moe_rewrite.passes.pipeline import TO_CUT, run
from moe_rewrite.passes.split import segments

WIDTH = 4


class Layer(nn.Module):
    """A linear map, and something that has settings in evaluation."""

    def __init__(self, work):
        super().__init__()
        self.linear, self.norm, self.work = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), work
        self.recurrent = nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return torch.relu(self.work(self, self.linear(x)))


class Net(nn.Module):
    def __init__(self, work, order=(0, 1, 2)):
        super().__init__()
        self.order = order
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(work) for _ in range(3))
        for layer in self.layers:
            layer.norm.running_mean.uniform_(-1, 1)
            layer.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


WORKS = {
    "dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "dropout of channels": lambda m, x: F.dropout1d(x[..., None], 0.5, m.training)[..., 0],
    "alpha dropout": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "rrelu": lambda m, x: F.rrelu(x, 0.1, 0.9, m.training),
    "batch norm": lambda m, x: m.norm(x),
    "recurrent": lambda m, x: m.recurrent(x[:, None])[0][:, 0],
    "attention": lambda m, x: F.scaled_dot_product_attention(
        *[x[:, None]] * 3, dropout_p=0.5 if m.training else 0.0
    )[:, 0],
}


def cut(model, given, mode="train"):
    return run(TO_CUT, program_of(model, given, mode), Decisions(1))


def settings(nodes):
    return [argument(n, name) for n in nodes for name in op(n).evaluation]


def values(program, model, x):
    """By the node's name, of a call in which batches write to copies of the statistics."""
    state = {n: t.clone() for n, t in model.state_dict().items()} | program.constants
    inputs = [program.inputs[n.name] for n in program.graph.find_nodes(op="placeholder")]
    run_ = fx.Interpreter(program.root, graph=program.graph, garbage_collect_values=False)
    run_.run(*(x if i.kind == "user" else state[i.name] for i in inputs))
    return {n.name: v for n, v in run_.env.items()}, state


@pytest.mark.parametrize("name", WORKS)
def test_before_the_cut_a_training_graph_computes_as_in_evaluation(name):
    model = Net(WORKS[name])
    program = cut(model, torch.zeros(2, WIDTH))
    shallow, deep = segments(program)
    training, after_cut = settings(shallow), settings(deep)
    assert training and after_cut
    frozen = run((FreezeShallow(),), program, Decisions(1))
    assert settings(shallow) != training and settings(deep) == after_cut
    assert frozen.numerics[-1] == ("freeze", "exact")
    x = torch.randn(5, WIDTH)
    made, state = values(frozen, model, x)
    with torch.no_grad():
        torch.testing.assert_close(made[frozen.cut.node], model.eval().layers[0](x))
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert not any(n.startswith("layers.0") and "running" in n for n in moved)
    assert any("running" in n for n in moved) == (name == "batch norm")


def test_a_layer_that_runs_again_after_the_cut_trains_there():
    """The program records it, since no mode of that layer computes both."""
    program = cut(Net(WORKS["dropout"], (0, 1, 0)), torch.zeros(2, WIDTH))
    frozen = run((FreezeShallow(),), program, Decisions(1))
    assert [settings(part) for part in segments(frozen)] == [[False], [True, True]]
    assert frozen.shallow_reruns


@pytest.mark.parametrize("name", ["dropout", "batch norm"])
def test_a_graph_in_evaluation_stays_as_it_is(name):
    model = Net(WORKS[name])
    program = cut(model, torch.zeros(2, WIDTH), "eval")
    before = [(n.name, n.target, n.args, n.kwargs) for n in program.graph.nodes]
    frozen = run((FreezeShallow(),), program, Decisions(1))
    assert [(n.name, n.target, n.args, n.kwargs) for n in frozen.graph.nodes] == before
    assert not frozen.shallow_reruns


def test_without_anything_to_turn_off_nothing_runs_otherwise():
    model = networks.Network(["Mlp", "Mlp"], tokens=False)
    program = cut(model, model.input(2, 6))
    frozen = run((FreezeShallow(),), program, Decisions(1))
    assert not frozen.shallow_reruns and not any(settings(n) for n in segments(frozen))


@pytest.mark.parametrize("draw", [torch.rand_like, torch.bernoulli], ids=lambda f: f.__name__)
def test_other_random_numbers_before_the_cut_are_refused_in_training(draw):
    model = Net(lambda m, x: x + draw(torch.sigmoid(x)) if m.training else x)
    program = cut(model, torch.zeros(2, WIDTH))
    with pytest.raises(CaptureError, match=f"{draw.__name__}.*random numbers before the cut"):
        run((FreezeShallow(),), program, Decisions(1))


def test_random_numbers_after_the_cut_or_in_evaluation_are_left_alone():
    class Last(Net):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x)

    frozen = run((FreezeShallow(),), cut(Last(WORKS["dropout"]), torch.zeros(2, 4)), Decisions(1))
    assert any(op_name(n) == "rand_like" for n in segments(frozen)[1])
    always = Net(lambda m, x: x + torch.rand_like(x))
    program = cut(always, torch.zeros(2, WIDTH), "eval")
    frozen = run((FreezeShallow(),), program, Decisions(1))
    assert any(op_name(n) == "rand_like" for n in segments(frozen)[0])
