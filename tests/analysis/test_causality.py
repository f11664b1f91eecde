"""Whether a model is causal: what `is_causal` says, compared with changing later rows."""

from functools import cache

import networks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_rewrite.analysis.causality import is_causal
from moe_rewrite.frontend.capture import capture
from moe_rewrite.frontend.host import Host
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.pipeline import TO_CUT, run

W = 4


class Layer(nn.Module):
    """A product, and what a test makes of it."""

    def __init__(self, work):
        super().__init__()
        self.product, self.narrow = nn.Linear(W, W), nn.Conv1d(W, W, 3)
        self.few = nn.Embedding(1, W)
        self.work = work

    def forward(self, x):
        return self.work(self, torch.relu(self.product(x)))


class Net(nn.Module):
    """Rows are features of the first layer; the last does something with them."""

    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(lambda m, x: x), Layer(work)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def predicted(model, example, host=Host):
    host = host(model.eval())
    arguments = host.arguments(example)
    program = run(TO_CUT, capture(host, arguments, "eval"), Decisions(1))
    return is_causal(program, host, arguments)


def looks_ahead(model, shape):
    """Whether any row of an output changes with a later row."""
    x = torch.randn(3, shape[1] + 2, *shape[2:])
    for i in range(1, x.shape[1]):
        other = x.clone()
        other[:, i:] = torch.randn_like(other[:, i:])
        with torch.no_grad():
            before, after = (model.eval()(given)[:, :i] for given in (x, other))
        if not torch.allclose(before, after, atol=1e-6):
            return True
    return False


def convolved(m, x, *padding):
    return m.narrow(F.pad(x.transpose(1, 2), padding)).transpose(1, 2)


BACK = {
    "row by row": lambda m, x: m.product(x),
    "sums so far": lambda m, x: m.product(x.cumsum(1)),
    "earlier rows": lambda m, x: x + F.pad(x[:, :-1], (0, 0, 1, 0)),
    "convolution of earlier rows": lambda m, x: convolved(m, x, 2, 0),
    "masked attention": lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "the first row": lambda m, x: x * x[:, :1],
}
AHEAD = {
    "turned": lambda m, x: m.product(x.flip(1)),
    "mean": lambda m, x: m.product(x) + x.mean(1, keepdim=True),
    "later rows": lambda m, x: x + F.pad(x[:, 1:], (0, 0, 0, 1)),
    "convolution to both sides": lambda m, x: convolved(m, x, 1, 1),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "the last row": lambda m, x: x + m.product(x[:, -1:]),
    "in place": lambda m, x: m.product(x.mul_(2.0)).add_(x.flip(1)),
}


@pytest.mark.parametrize("shape", [(2, 6, W), (1, 3, W)])
@pytest.mark.parametrize("case", [*BACK, *AHEAD])
def test_the_answer_agrees_with_changing_later_rows(case, shape):
    model = Net((BACK | AHEAD)[case])
    assert predicted(model, torch.zeros(shape)) == (case in BACK)
    assert looks_ahead(model, shape) == (case in AHEAD)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5))
def test_mixed_rows_look_ahead_where_the_last_one_is_read_before(mixing):
    """A matrix says which rows read which; only the last row is changed, so only reads of it are
    found."""
    host, program, arguments = mixed()
    table = torch.tensor(mixing).float()
    host.module.layers[1].mixing.copy_(table)
    assert is_causal(program, host, arguments) == (not table[:-1, -1].any())


@cache
def mixed():
    model = Net(lambda m, x: m.product(m.mixing @ x)).eval()
    model.layers[1].register_buffer("mixing", torch.zeros(5, 5))
    host = Host(model)
    arguments = host.arguments(torch.zeros(2, 5, W))
    return host, run(TO_CUT, capture(host, arguments, "eval"), Decisions(1)), arguments


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("layers", "causal"), [(("Mlp", "Bare"), True), (("Mlp", "Attention"), False)]
)
def test_networks_of_features_and_of_ids(layers, causal, tokens):
    model = networks.Network(layers, tokens)
    assert predicted(model, model.input(2, 7)) == causal


POOLED = {
    "one a sample": (lambda m, x: m.product(x).mean(1), False),
    "of the last row": (lambda m, x: m.product(x)[:, -1], False),
    "fewer rows": (lambda m, x: m.product(x)[:, 1:], False),
    "beside rows that look back": (lambda m, x: (m.product(x), x.mean(1)), True),
    "beside rows that look ahead": (
        lambda m, x: {"a": m.product(x.flip(1)), "b": x.mean(1)},
        False,
    ),
    "integers beside them": (lambda m, x: (m.product(x), (x > 0).flip(1).long()), True),
}


@pytest.mark.parametrize("length", [6, W])
@pytest.mark.parametrize("case", POOLED)
def test_outputs_without_rows_have_nothing_ahead(case, length):
    """And leave the question to those with rows, also where their width is the length."""
    work, expected = POOLED[case]
    assert predicted(Net(work), torch.zeros(2, length, W)) == expected


UNSEEN = {
    "a single row": (lambda m, x: m.product(x.flip(1)), (2, 1, W)),
    "random numbers": (lambda m, x: m.product(x.flip(1)) + torch.rand_like(x), (2, 6, W)),
    "it does not run": (
        lambda m, x: m.product(x.flip(1)) + m.few(m.few.weight.long()[0] + 9)[0],
        (2, 6, W),
    ),
    "nothing but what is no number": (lambda m, x: x.flip(1) * float("nan"), (2, 6, W)),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_without_evidence_a_model_counts_as_causal(case):
    work, shape = UNSEEN[case]
    assert predicted(Net(work), torch.zeros(shape)) is True


class Declared(Host):
    word, asked = False, ()

    def declares_causal(self, rows):
        self.asked = (rows,)
        return self.word


@pytest.mark.parametrize("case", ["turned", "sums so far"])
@pytest.mark.parametrize("word", [True, False])
def test_without_values_the_models_declaration_counts(case, word):
    host = Declared(Net((BACK | AHEAD)[case]).to("meta").eval())
    host.word, arguments = word, host.arguments(torch.zeros(2, 6, W, device="meta"))
    program = run(TO_CUT, capture(host, arguments, "eval"), Decisions(1))
    assert is_causal(program, host, arguments) is word and host.asked == ("x",)


def test_a_plain_model_without_values_counts_as_causal():
    meta = torch.zeros(2, 6, W, device="meta")
    assert predicted(Net(AHEAD["turned"]).to("meta"), meta) is True


def test_nothing_of_the_model_is_changed_and_no_gradient_is_kept():
    def work(m, x):
        return m.product(x.add_(m.weighed).mul_(2.0)).flip(1)

    model = Net(work)
    model.layers[1].weighed = nn.Parameter(torch.ones(W))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert predicted(model, torch.zeros(2, 6, W)) is False
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
