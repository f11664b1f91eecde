"""FLOPs of one sample, by hand and by PyTorch's own counter; names of dynamic sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_rewrite.analysis.flops import Sizes, hint, numel
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op_name

W = 4


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.back = nn.Linear(W, 6), nn.Linear(6, W, bias=False)
        self.embed, self.line = nn.Embedding(9, W), nn.Conv1d(W, 6, 3, 2)
        self.conv, self.apart = nn.Conv2d(W, 6, (3, 2), 2, 1), nn.Conv2d(W, 8, 3, groups=W)
        self.solid = nn.Conv3d(W, 2, (1, 2, 3), groups=2)
        self.up, self.up_line = (
            nn.ConvTranspose2d(W, 6, (3, 2), 2, groups=2),
            nn.ConvTranspose1d(W, 6, 3),
        )
        self.cell, self.pair = nn.GRUCell(W, 5), nn.Bilinear(W, 3, 5)
        self.bias, self.cubes = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, W, 5))
        self.work = work

    def forward(self, x, y=None):
        return self.work(self, x) if y is None else self.work(self, x, y)


def sizes(work, *given):
    program = program_of(Net(work).eval(), given)
    return Sizes(program), list(program.graph.nodes)


COUNTED = {  # work, shape of a sample
    "linear": (lambda m, x: m.linear(x), (5, W)),
    "linear of samples": (lambda m, x: m.back(m.linear(x)), (W,)),
    "linear of four dimensions": (lambda m, x: m.linear(x), (2, 3, W)),
    "matmul": (lambda m, x: x @ m.linear.weight.t(), (5, W)),
    "mm": (lambda m, x: torch.mm(x.flatten(0, 1), m.linear.weight.t()), (5, W)),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.linear.weight.t()), (5, W)),
    "bmm": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), (5, W)),
    "baddbmm": (lambda m, x: torch.baddbmm(x, torch.bmm(x, x.transpose(1, 2)), x), (5, W)),
    "products of heads": (lambda m, x: (x @ x.transpose(-1, -2)).softmax(-1) @ x, (2, 5, W)),
    "a product for each of three": (lambda m, x: x @ m.cubes, (3, 7, W)),
    "line": (lambda m, x: m.line(x), (W, 9)),
    "map": (lambda m, x: m.conv(x), (W, 8, 12)),
    "depthwise": (lambda m, x: m.apart(x), (W, 8, 5)),
    "solid": (lambda m, x: m.solid(x), (W, 3, 4, 5)),
    "general convolution": (
        lambda m, x: torch.convolution(
            x, m.conv.weight, None, [1, 1], [0, 0], [2, 1], False, [0, 0], 1
        ), (W, 8, 12),
    ),
    "transposed": (lambda m, x: m.up(x), (W, 5, 3)),
    "transposed line": (lambda m, x: m.up_line(x), (W, 9)),
    "general transposed convolution": (
        lambda m, x: torch.convolution(
            x, m.up.weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 2
        ), (W, 5, 3),
    ),
    "named dimensions": (lambda m, x: torch.einsum("bsd,hd->bsh", x, m.linear.weight), (5, W)),
    "named dimensions of three": (
        lambda m, x: torch.einsum("...d,hd,h->...h", x, m.linear.weight, m.bias), (2, 5, W),
    ),
    "product over dimensions": (
        lambda m, x: torch.tensordot(x, m.linear.weight, dims=([2], [1])), (5, W),
    ),
    "inner": (lambda m, x: torch.inner(x, m.linear.weight), (5, W)),
    "a recurrent step": (lambda m, x: m.cell(x), (W,)),
    "a weight used twice": (lambda m, x: m.linear(x) + m.linear(x * 2.0), (5, W)),
    "with other work": (
        lambda m, x: F.layer_norm(m.back(torch.tanh(m.linear(x)) * 2.0), [W]).sum(-1), (5, W),
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("case", COUNTED)
def test_flops_are_those_of_pytorch_on_one_sample(case, batch):
    work, shape = COUNTED[case]
    found, nodes = sizes(work, torch.zeros(batch, *shape))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Net(work).eval()(torch.zeros(1, *shape))
    assert found.flops(nodes) == counter.get_total_flops() > 0


BY_HAND = {  # work -> FLOPs of a sequence of n rows
    "linear": (lambda m, x: m.linear(x), lambda n: 2 * n * W * 6),
    "a vector": (lambda m, x: x @ m.linear.weight[0], lambda n: 2 * n * W),
    "scores and values": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x), lambda n: 2 * n * n * (W + W),
    ),
    "values of another width": (
        lambda m, x: F.scaled_dot_product_attention(x, x, m.linear(x)),
        lambda n: 2 * n * W * 6 + 2 * n * n * (W + 6),
    ),
    "keys of another length": (
        lambda m, x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2]),
        lambda n: 2 * n * 2 * (W + W),
    ),
    "heads": (
        lambda m, x: F.scaled_dot_product_attention(
            *[x.unflatten(-1, (2, 2)).transpose(1, 2)] * 3, is_causal=True
        ),
        lambda n: 2 * (2 * n * n * (2 + 2)),
    ),
    "of two values": (lambda m, x: m.pair(x, x[..., 1:]), lambda n: 2 * n * 5 * W * 3),
    "merged rows": (lambda m, x: m.linear(x.reshape(-1, W)), lambda n: 2 * n * W * 6),
    "no product": (lambda m, x: torch.cumsum(x.exp() * m.linear.weight[0], 1), lambda n: 0),
}  # fmt: skip


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 7), (4, 12)])
@pytest.mark.parametrize("case", BY_HAND)
def test_flops_by_hand(case, batch, length):
    work, expected = BY_HAND[case]
    found, nodes = sizes(work, torch.zeros(batch, length, W))
    assert found.flops(nodes) == expected(length)


def test_flops_are_of_the_given_nodes_alone():
    found, nodes = sizes(lambda m, x: m.back(torch.relu(m.linear(x))), torch.zeros(2, 5, W))
    each = [(op_name(n), found.flops([n])) for n in nodes if n.op == "call_function"]
    assert each == [("linear", 240), ("relu", 0), ("linear", 240)] and found.flops([]) == 0


RECURRENT = {  # layer -> FLOPs of one row
    nn.RNN: 2 * 5 * (W + 5), nn.GRU: 2 * 3 * 5 * (W + 5), nn.LSTM: 2 * 4 * 5 * (W + 5),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export on their own lists
@pytest.mark.parametrize("layer", RECURRENT)
def test_recurrent_layers_multiply_each_row_with_every_weight(layer):
    net = Net(lambda m, x: m.layer(x)[0]).eval()
    net.layer = layer(W, 5, 2, batch_first=True, bidirectional=True)
    program = program_of(net, torch.zeros(2, 7, W))
    second = RECURRENT[layer] // (W + 5) * (10 + 5)  # which reads both directions
    assert Sizes(program).flops(list(program.graph.nodes)) == 7 * 2 * (RECURRENT[layer] + second)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_sample_of_a_batch_of_fixed_size(batch):
    found, nodes = sizes(
        lambda m, x: m.linear(x) + torch.zeros(batch, 1, 1), torch.zeros(batch, 5, W)
    )
    assert found.flops(nodes) == 2 * 5 * W * 6


def test_looking_ids_up_costs_nothing():
    found, nodes = sizes(lambda m, x: m.embed(x), torch.zeros(2, 5, dtype=torch.long))
    assert found.flops(nodes) == 0


def named(found, nodes, name):
    (node,) = [n for n in nodes if n.op == "call_function" and op_name(n) == name]
    return [found.word(s) for s in value(node).shape], [
        found.of_sample(s) for s in value(node).shape
    ]


@pytest.mark.parametrize("length", [5, 8])
def test_dynamic_sizes_have_names_and_a_value_for_one_sample(length):
    found, nodes = sizes(
        lambda m, x: m.linear(x.tanh()).reshape(-1, 3).exp(), torch.zeros(3, length, W)
    )
    assert sorted(found.words.values()) == ["batch", "sequence"]
    assert found.lengths == {"sequence": length}
    assert named(found, nodes, "tanh") == (["batch", "sequence", "4"], [1, length, W])
    words, values = named(found, nodes, "exp")
    assert values == [2 * length, 3] and words[1] == "3"
    assert set(words[0].replace("*", " ").split()) == {"2", "batch", "sequence"}


def test_a_second_length_goes_by_its_argument():
    given = torch.zeros(2, 5, W), torch.zeros(2, 9, W)
    found, nodes = sizes(lambda m, x, y: m.linear(x).exp().sum() + m.linear(y).tanh(), *given)
    assert found.lengths == {"sequence": 5, "y_1": 9}
    assert named(found, nodes, "exp") == (["batch", "sequence", "6"], [1, 5, 6])
    assert named(found, nodes, "tanh") == (["y_0", "y_1", "6"], [1, 9, 6])
    assert found.flops(nodes) == 2 * (5 + 9) * W * 6


def test_an_image_has_no_open_size_but_the_batch():
    found, nodes = sizes(lambda m, x: m.conv(x), torch.zeros(2, W, 8, 12))
    assert list(found.words.values()) == ["batch"] and found.lengths == {}
    assert named(found, nodes, "conv2d") == (["batch", "6", "4", "7"], [1, 6, 4, 7])
    assert found.word(17) == "17" and found.of_sample(17) == 17


def test_a_size_that_depends_on_values_counts_as_one():
    found, nodes = sizes(lambda m, x: m.linear(x[x[:, 0] > 0]), torch.zeros(3, W))
    assert found.flops(nodes) == 2 * W * 6


@pytest.mark.parametrize("length", [5, 8])
def test_sizes_at_the_values_of_the_example(length):
    _, nodes = sizes(lambda m, x: m.linear(x), torch.zeros(3, length, W))
    (shape,) = [value(n).shape for n in nodes if n.op == "call_function"]
    batch, *rest = map(hint, shape)
    assert rest == [length, 6] and hint(7) == 7
    assert numel(value(nodes[-2])) == batch * length * 6
