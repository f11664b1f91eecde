"""Products with a parameter are recognised in every form, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_rewrite.analysis.linear_ops import Product, find_product, innermost_module, weight_name
from moe_rewrite.analysis.static_values import static_values
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op

IN, OUT = 4, 6


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.square = nn.Linear(IN, OUT), nn.Linear(IN, IN, bias=False)
        self.w, self.v = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(OUT, IN))
        self.cube = nn.Parameter(torch.randn(2, IN, OUT))
        self.bias = nn.Parameter(torch.randn(OUT))
        self.register_buffer("fixed", torch.randn(OUT, IN))
        self.conv, self.line = nn.Conv2d(3, 6, (3, 1), 2, (1, 0), groups=3), nn.Conv1d(IN, IN, 1)
        self.back = nn.ConvTranspose2d(3, 3, 2)
        self.work = work

    def forward(self, x):
        return self.work(self, x)


def products(work, shape=(2, 3, IN)):
    """(program, what is found of each node that is something)."""
    program = program_of(Net(work), torch.zeros(shape))
    static = static_values(program)
    found = [find_product(static, n) for n in program.graph.nodes]
    return program, [f for f in found if f is not None]


LINEAR = {  # what computes x times a weight -> the weight, stored (in, out), bias
    "linear": (lambda m, x: m.linear(x), "linear.weight", False, "linear.bias"),
    "without bias": (lambda m, x: m.square(x), "square.weight", False, None),
    "functional": (lambda m, x: F.linear(x, m.v, m.bias), "v", False, "bias"),
    "matmul": (lambda m, x: x @ m.w, "w", True, None),
    "with t": (lambda m, x: x @ m.v.t(), "v", False, None),
    "with T": (lambda m, x: torch.matmul(x, m.v.T), "v", False, None),
    "transposed": (lambda m, x: x @ m.v.transpose(0, 1), "v", False, None),
    "from the back": (lambda m, x: x @ m.v.transpose(-1, -2), "v", False, None),
    "permuted": (lambda m, x: x @ m.v.permute(1, 0), "v", False, None),
    "not moved by a transpose": (lambda m, x: x @ m.w.transpose(1, 1), "w", True, None),
    "not moved by a permute": (lambda m, x: x @ m.w.permute(0, 1), "w", True, None),
    "mm": (lambda m, x: x.reshape(-1, IN).mm(m.w), "w", True, None),
    "mm with t": (lambda m, x: torch.mm(x.reshape(-1, IN), m.v.t()), "v", False, None),
    "addmm": (lambda m, x: torch.addmm(m.bias, x.reshape(-1, IN), m.w), "w", True, "bias"),
    "einsum": (lambda m, x: torch.einsum("bsd,dh->bsh", x, m.w), "w", True, None),
    "einsum with the weight first": (
        lambda m, x: torch.einsum("hd, bsd -> bsh", m.v, x),
        "v",
        False,
        None,
    ),
    "einsum with an ellipsis": (
        lambda m, x: torch.einsum("...d,hd->...h", x, m.v),
        "v",
        False,
        None,
    ),
    "einsum without a result": (lambda m, x: torch.einsum("abc,cd", x, m.w), "w", True, None),
    "addmm with t": (lambda m, x: m.bias.addmm(x.flatten(0, 1), m.v.t()), "v", False, "bias"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_every_form_of_a_linear_map(case):
    work, weight, transposed, bias = LINEAR[case]
    program, (found,) = products(work)
    assert program.inputs[found.weight.name].name == weight and found.transposed == transposed
    assert (program.inputs[found.bias.name].name if found.bias is not None else None) == bias
    assert (
        value(found.rows).shape[-1] == IN
        and found.rows in found.node.all_input_nodes
        and not found.options
    )


@pytest.mark.parametrize("case", LINEAR)
def test_the_product_is_rows_by_weight_plus_bias(case):
    """By the numbers, so that no form is taken for its transpose."""
    work, weight, transposed, bias = LINEAR[case]
    model, x = Net(work), torch.randn(2, 5, IN)
    with torch.no_grad():
        w = model.get_parameter(weight)
        expected = x @ (w if transposed else w.t())
        expected = expected if bias is None else expected + model.get_parameter(bias)
        torch.testing.assert_close(model(x).reshape(expected.shape), expected)


COMPUTED = {  # what computes x times a weight that is no parameter -> the tensor that names it
    "buffer": (lambda m, x: F.linear(x, m.fixed), "fixed"),
    "transposed buffer": (lambda m, x: x @ m.fixed.t(), "fixed"),
    "scaled": (lambda m, x: F.linear(x, m.v * 2.0), "v"),
    "sum": (lambda m, x: x @ (m.w + m.v.t()), "w"),
    "dequantised": (lambda m, x: F.linear(x, m.fixed.to(torch.int8).float() * m.bias[:, None]), "fixed"),
    "normed": (lambda m, x: F.linear(x, F.normalize(m.v, dim=1)), "v"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_a_weight_may_be_computed(case):
    work, name = COMPUTED[case]
    program, (found,) = products(work)
    assert isinstance(found, Product) and value(found.rows).shape[-1] == IN
    assert weight_name(program, static_values(program), found) == name


OTHERS = {  # what is not a linear map -> the reason; None if it is no product at all
    "of values": (lambda m, x: x @ x.transpose(1, 2), None),
    "weight on the left": (lambda m, x: m.w.t() @ x.transpose(1, 2), None),
    "of three dimensions": (lambda m, x: x.unsqueeze(1) @ m.cube, "a weight of three dimensions"),
    "pointwise": (lambda m, x: x * m.w[:, 0], None),
    "an embedding": (lambda m, x: F.embedding(x.long()[..., 0], m.w), None),
    "of weights": (lambda m, x: x + (m.v @ m.w).sum(), "its input does not depend on the call"),
    "of the call": (lambda m, x: F.linear(x, x[0] * 2.0), "computed from the call's inputs"),
    "alpha": (
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.w, alpha=2), "addmm with alpha or beta",
    ),
    "beta": (
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.w, beta=0), "addmm with alpha or beta",
    ),
    "an einsum over positions": (
        lambda m, x: torch.einsum("bsd,dh->bhs", x, m.w), "is not a plain linear map",
    ),
    "an einsum of three": (
        lambda m, x: torch.einsum("bsd,dh,h->bsh", x, m.w, m.w[0]), "is not a plain linear map",
    ),
    "convolution of one sample": (lambda m, x: m.line(x[0].T), "without a batch dimension"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_a_linear_map_says_why_if_it_is_a_product(case):
    work, reason = OTHERS[case]
    _, found = products(work)
    assert [isinstance(f, str) for f in found] == ([] if reason is None else [True])
    assert all(reason in f for f in found)


CONVOLUTIONS = {
    "options": (lambda m, x: m.conv(x), ([2, 2], [1, 0], [1, 1]), "conv.bias"),
    "words": (
        lambda m, x: F.conv2d(x, m.conv.weight, None, 1, "same", 2, 3),
        ([1, 1], "same", [2, 2]), None,
    ),
    "single numbers": (
        lambda m, x: torch.conv2d(x, m.conv.weight, m.conv.bias, [2], [1], [1], 3),
        ([2, 2], [1, 1], [1, 1]), "conv.bias",
    ),
    "general": (
        lambda m, x: torch.convolution(
            x, m.conv.weight, None, [1, 1], [1, 0], [1, 1], False, [0, 0], 3
        ),
        ([1, 1], [1, 0], [1, 1]), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_with_their_options(case):
    work, options, bias = CONVOLUTIONS[case]
    program, (found,) = products(work, (2, 3, 9, 9))
    assert isinstance(found, Product) and found.options == options
    assert program.inputs[found.weight.name].name == "conv.weight" and not found.transposed
    assert (program.inputs[found.bias.name].name if found.bias is not None else None) == bias


@pytest.mark.parametrize("general", [True, False])
def test_a_transposed_convolution_has_its_weight_the_other_way(general):
    def work(m, x):
        if general:
            return torch.convolution(
                x, m.back.weight, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1
            )
        return m.back(x)

    _, (found,) = products(work, (2, 3, 9, 9))
    assert found.transposed and found.options == ([1, 1], [0, 0], [1, 1], [0, 0])


def test_a_weight_made_of_the_call_is_refused():
    def work(m, x):
        return F.conv2d(x, x[:, :1, :2, :2].repeat(3, 3, 1, 1)[:3])

    _, found = products(work, (2, 3, 9, 9))
    assert len(found) == 1 and "the call's inputs" in found[0]


def test_a_tied_weight_is_found_at_both_uses():
    program, found = products(lambda m, x: m.square(torch.tanh(m.square(x))))
    assert len(found) == 2 and found[0].weight is found[1].weight


def test_the_innermost_module_of_a_node_or_its_own_name():
    program, (inside,) = products(lambda m, x: m.linear(x))
    assert innermost_module(inside.node) == "linear" and op(inside.node).product == "linear"
    _, (bare,) = products(lambda m, x: x @ m.w)
    assert innermost_module(bare.node) == bare.node.name == "matmul"
