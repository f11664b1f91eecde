"""Feed-forward regions by dataflow: all forms, what they compute, and what is not one."""

import feedforwards
import pytest
import torch
import torch.nn.functional as F
from feedforwards import D, H
from torch import nn

from moe_rewrite.analysis.feedforward import FeedForward, find_feedforward
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.aten import value
from moe_rewrite.ir.ops import op_name
from moe_rewrite.passes.base import Decisions
from moe_rewrite.passes.clean import Clean


class Net(nn.Module):
    """Products that a test puts together."""

    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.both, self.narrow, self.square = nn.Linear(D, 2 * H), nn.Linear(H, 5), nn.Linear(H, H)
        self.a, self.c = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H, D))
        self.norm, self.scale = nn.LayerNorm(H), nn.Parameter(torch.rand(H))
        self.wide, self.back = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1, bias=False)
        self.near, self.mixes = nn.Conv2d(D, H, 3, 1, 1), nn.Conv1d(H, H, 3, padding=1)
        self.register_buffer("shift", torch.rand(H))
        self.work = work

    def forward(self, x):
        return self.work(self, x * 2.0)


def regions(work, shape=(2, 6, D), mode="eval"):
    model = work if isinstance(work, nn.Module) else Net(work).eval()
    program = Clean().apply(program_of(model, torch.zeros(shape), mode), Decisions("auto"))
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    return model, program, list(find_feedforward(program, nodes))


FORMS = {  # how x is mapped -> names of the weights of the products of x, and between
    "plain": (lambda m, x: m.down(F.gelu(m.up(x))), ["up"], ["gelu"]),
    "gated": (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), ["gate", "up"], ["silu", "mul"]),
    "gated by itself": (
        lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(1.702 * h)), ["up"],
        ["mul", "sigmoid", "mul"],
    ),
    "in place": (lambda m, x: m.down(m.up(x).relu_()), ["up"], ["relu"]),
    "by halves": (
        lambda m, x: m.down((h := m.both(x))[..., :H] * h[..., H:].tanh()), ["both"],
        ["slice", "slice", "tanh", "mul"],
    ),
    "by parts": (
        lambda m, x: m.down(F.gelu((h := m.both(x).split(H, -1))[0]) * h[1]), ["both"],
        ["split", "getitem", "gelu", "getitem", "mul"],
    ),
    "glu": (lambda m, x: m.down(F.glu(m.both(x))), ["both"], ["glu"]),
    "norm": (lambda m, x: m.down(m.norm(m.up(x).relu())), ["up"], ["relu", "layer_norm"]),
    "scale and shift": (
        lambda m, x: m.down(m.up(x).relu() * m.scale + m.shift), ["up"], ["relu", "mul", "add"],
    ),
    "cast": (
        lambda m, x: m.down(m.up(x).double().relu().float()), ["up"], ["to", "relu", "to"],
    ),
    "stored otherwise": (
        lambda m, x: (torch.addmm(m.shift, x.reshape(-1, D), m.a).relu() @ m.c).view(x.shape),
        ["a"], ["relu"],
    ),
    "merged in between": (
        lambda m, x: m.down(m.up(x).flatten(0, 1).relu()).view(x.shape), ["up"], ["relu"],
    ),
    "dropout in evaluation": (
        lambda m, x: m.down(F.dropout(m.up(x).relu(), 0.5, m.training)), ["up"], ["relu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "rows"),
    [(c, r) for c in FORMS for r in [(3, 5), (4,)] if len(r) == 2 or "merged" not in c],
)
def test_a_region_computes_what_its_nodes_do(case, rows):
    """down(middle(products of x))."""
    work, ups, between = FORMS[case]
    shape = (2, 6, D) if len(rows) == 2 else (2, D)
    model, program, (found,) = regions(work, shape)
    names = [program.inputs[w.name].name for w in found.weights]
    assert [names[p.weight].removesuffix(".weight") for p in found.ups] == ups
    inner = [op_name(n) for n in found.middle.module.graph.nodes if n.op == "call_function"]
    assert sorted(inner) == sorted(between) and found.hidden == H and found.channels == -1
    assert op_name(found.entry) == "mul" and value(found.entry).shape[-1] == D
    x, tensors = torch.randn(*rows, D), model.state_dict()
    weights = [tensors[n] for n in names]

    def product(x, linear):
        w = weights[linear.weight]
        bias = None if linear.bias is None else weights[linear.bias]
        return F.linear(x, w.t() if linear.transposed else w, bias)

    hidden = found.middle.call(
        *(product(x * 2.0, up) for up in found.ups), *(weights[i] for i in found.extra)
    )
    with torch.no_grad():
        torch.testing.assert_close(product(hidden, found.down), model(x))


def test_the_region_is_all_from_its_rows_to_its_last_product():
    _, program, (found,) = regions(lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)))
    assert [op_name(n) for n in found.nodes] == ["linear", "silu", "linear", "mul", "linear"]
    assert found.exit is found.nodes[-1] and found.entry not in found.nodes
    assert op_name(next(iter(found.exit.users))) == "add"


def test_a_dropout_that_is_on_stays_between():
    for mode, between in (("eval", ["gelu"]), ("train", ["gelu", "dropout"])):
        _, _, (found,) = regions(feedforwards.Plain().train(mode == "train"), mode=mode)
        graph = found.middle.module.graph
        assert [op_name(n) for n in graph.nodes if n.op == "call_function"] == between


def test_convolutions_of_one_pixel_are_products():
    model, _, (found,) = regions(lambda m, x: m.back(F.gelu(m.wide(x))), (2, D, 4, 4))
    assert found.channels == 1 and all(p.pointwise for p in (*found.ups, found.down))
    assert found.hidden == H and found.down.bias is None


@pytest.mark.parametrize("body", feedforwards.BODIES, ids=lambda b: b.__name__)
def test_the_name_is_what_the_weights_share(body):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([body(), body()])

        def forward(self, x):
            return self.blocks[1](torch.sin(self.blocks[0](x)))

    _, program, found = regions(Two())
    names = [f.name(program) for f in found if isinstance(f, FeedForward)]
    assert names == ["blocks.0", "blocks.1"]


def test_without_a_shared_name_it_is_the_last_products():
    _, program, (found,) = regions(lambda m, x: m.down(F.gelu(m.up(x))))
    assert found.name(program) == "down"


NONE = {
    "no work between": lambda m, x: m.down(m.up(x)),
    "a norm alone between": lambda m, x: m.down(m.norm(m.up(x))),
    "to another width": lambda m, x: m.narrow(m.up(x).relu()),
    "one product": lambda m, x: m.up(x).relu(),
    "positions are mixed": lambda m, x: m.down(m.up(x).relu().cumsum(1)),
    "features are mixed": lambda m, x: m.down(m.up(x).softmax(-1)),
    "a convolution between": lambda m, x: m.down(
        m.mixes(m.up(x).relu().transpose(1, 2)).transpose(1, 2)
    ),
    "of two different rows": lambda m, x: m.down(m.up(x).relu() * m.gate(x.flip(1))),
    "with other values between": lambda m, x: m.down(m.up(x).relu() + x[..., :1]),
    "split along positions": lambda m, x: m.down(torch.cat(m.up(x).relu().chunk(2, 1), 1)),
    "halves of positions": lambda m, x: m.down(m.up(x)[:, 1:].relu()),
    "features become positions": lambda m, x: m.down(
        m.up(x).relu().transpose(1, 2).reshape(x.shape[0], -1, H)
    ),
    "a scale for each position": lambda m, x: m.down(m.up(x).relu() * x.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_feed_forward(case):
    assert regions(NONE[case])[2] == []


def test_a_computed_weight_is_named():
    reasons = regions(lambda m, x: F.linear(m.up(x).relu(), m.down.weight * 2.0))[2]
    assert len(reasons) == 1 and "its weight is no parameter but computed" in reasons[0][1]


def test_attention_and_wider_windows_are_none():
    import networks

    model = networks.Attention()
    assert regions(model, (2, 6, networks.WIDTH))[2] == []
    assert regions(lambda m, x: m.back(m.near(x).relu()), (2, D, 4, 4))[2] == []
    assert regions(lambda m, x: m.back(m.wide(x).relu().mean(2, True)), (2, D, 4, 4))[2] == []


UNFIT = {
    "read outside": (
        lambda m, x: (m.down(h := m.up(x).relu()), h.sum()), "reads relu inside of the feed-forward",
    ),
    "more dimensions": (
        lambda m, x: m.down(m.up(x.flatten(0, 1) + 1.0).relu().view(-1, 6, H)), "more dim",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_near_miss_has_a_reason(case):
    work, reason = UNFIT[case]
    shape = (2, 6, D)
    _, _, (found,) = regions(work, shape)
    name, why = found
    assert name == "down" and reason in why


def test_of_a_chain_of_products_each_is_in_one_region():
    """The first that it fits: from x to its width again, then from there."""
    _, program, found = regions(lambda m, x: m.down(F.gelu(m.up(m.down(F.gelu(m.up(x)))))))
    assert len(found) == 2 and not set(found[0].nodes) & set(found[1].nodes)
    assert found[1].entry is found[0].exit


def test_only_nodes_that_are_asked_about_are_looked_at():
    _, program, (found,) = regions(lambda m, x: m.down(F.gelu(m.up(x))))
    assert list(find_feedforward(program, list(found.nodes[1:]))) == []
    assert len(list(find_feedforward(program, list(found.nodes)))) == 1


def test_a_region_that_writes_to_what_others_read_is_none():
    """The dataflow does not show whether they read it before or after the write."""
    assert regions(lambda m, x: m.down((h := m.up(x)).exp() + h.relu_()))[2] == []


def test_a_region_that_writes_through_a_view_to_what_others_read_is_none():
    def work(m, x):
        h = m.up(x)
        return m.down(h.exp() + h.view(-1, H).relu_().view_as(h))

    assert regions(work)[2] == []
