"""Activations of a feed-forward are recognised by their operations, never by values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.experts.ffn.activation_match import FusedFFN, find_fused_form
from moe_rewrite.ir.program import Code

WIDTH = 8
ONE, GATED = (0, None), ((1, None), (0, None))


def code(function, count=1):
    """The operations of a function of so many products."""

    class Between(nn.Module):
        def forward(self, *products):
            return function(*products)

    module = torch.export.export(Between(), tuple(torch.randn(3, WIDTH) for _ in range(count)))
    module = module.graph_module
    (made,) = module.graph.output_node().args[0]
    module.graph.output_node().args = (made,)
    module.recompile()
    return Code(module)


def by_tanh(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3.0))))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (by_tanh, "gelu_tanh"),
        (
            lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
            "gelu_tanh",
        ),
        (F.silu, "silu"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
        (lambda x: F.relu(x).square(), "relu2"),
        (lambda x: F.relu(x) * F.relu(x), "relu2"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: x.neg().neg(), "identity"),
    ],
)
def test_an_activation_written_in_any_way_is_recognised(function, name):
    assert find_fused_form(code(function), (WIDTH,)) == FusedFFN(name, ONE)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x).clamp(max=30),  # differs from silu at large inputs only
        lambda x: F.silu(x) + 1e-5,
        lambda x: F.silu(1.001 * x),
        lambda x: F.silu(x) if x.shape[0] > 100 else F.silu(x).clamp(min=-7),
        lambda x: F.gelu(x) + F.relu(x - 50),
        lambda x: torch.where(x > 40, x - 1, F.relu(x)),
        lambda x: F.hardtanh(F.relu(x), 0, 1000),
        lambda x: F.silu(x.to(torch.bfloat16)).to(x.dtype),
        lambda x: F.silu(F.dropout(x, 0.1)),
        lambda x: torch.div(F.silu(x), 1, rounding_mode="floor"),
        lambda x: F.silu(x.flip(-1)),
    ],
)
def test_what_only_looks_like_one_on_a_few_numbers_is_not(function):
    assert find_fused_form(code(function), (WIDTH,)) is None


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (lambda up, gate: F.silu(gate) * up, FusedFFN("silu", (0, None), (1, None))),
        (lambda up, gate: up * by_tanh(gate), FusedFFN("gelu_tanh", (0, None), (1, None))),
        (lambda up, gate: F.silu(gate) * up * 1.0001, None),
        (lambda up, gate: F.silu(gate) * up.clamp(-7, 7), None),
        (lambda up, gate: F.silu(gate + up), None),
    ],
)
def test_two_products(function, form):
    assert find_fused_form(code(function, 2), (WIDTH, WIDTH)) == form


def chunked(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (chunked, FusedFFN("silu", (0, 1), (0, 0))),
        (lambda x: F.relu(x[..., WIDTH // 2 :]) * x[..., : WIDTH // 2], FusedFFN("relu", (0, 0), (0, 1))),
        (lambda x: F.gelu(x.split(WIDTH // 2, -1)[0]) * x.split(4, -1)[1], FusedFFN("gelu", (0, 1), (0, 0))),
        (lambda x: F.silu(x[..., ::2]) * x[..., 1::2], None),
        (lambda x: F.silu(x[..., :4]) * x[..., 3:7], None),
    ],
)  # fmt: skip
def test_halves_of_one_product(function, form):
    assert find_fused_form(code(function), (WIDTH,)) == form


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)).clamp(max=30) * self.up(x))


@pytest.mark.parametrize("size", [1, 300, 3000])
def test_a_clamped_activation_is_right_at_any_size_of_input(size):
    torch.manual_seed(0)
    model = nn.Sequential(*(Clamped() for _ in range(3))).eval()
    x = torch.randn(2, 5, WIDTH)
    moe = moe_rewrite.convert(model, mode="upcycle", split=1, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(moe(size * x), model(size * x), rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    """An odd hidden width, which has no halves, and an activation that no fused form has."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def test_an_odd_hidden_width_converts():
    model, x = nn.Sequential(Odd(), Odd(), Odd()).eval(), torch.randn(2, 5, WIDTH)
    moe = moe_rewrite.convert(
        model,
        mode="upcycle",
        split=1,
        example_inputs=x,
        router=TokenRouter(top_k=2, base=False, init=0.5),
    )
    with torch.no_grad():
        torch.testing.assert_close(moe(x), model(x))
