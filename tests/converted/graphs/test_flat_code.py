"""Generated code runs the same operations as the blocks do, and steps aside where these must run."""

import copy

import pytest
import torch
from torch import fx, nn

import moe_rewrite
from moe_rewrite.converted.graphs.eager_code import BINDINGS, eager_function
from moe_rewrite.converted.graphs.flat_code import FlatCode
from tests.helpers import architectures, networks
from tests.helpers.reference import randomize

aten = torch.ops.aten
X, Y, W = torch.randn(2, 3, 8), torch.rand(2, 3, 8) + 0.5, torch.randn(4, 8)
MAP, HEADS = torch.randn(2, 3, 6, 6), torch.randn(2, 2, 5, 4)
PER_CHANNEL = [torch.rand(3) + 0.5 for _ in range(4)]
ARGUMENTS = {
    aten.pow.Tensor_Scalar: (Y, 2), aten.softmax.int: (X, -1), aten.mean.dim: (X, [-1], True),
    aten.sum.dim_IntList: (X, [0, 2], False), aten.cat.default: ([X, Y], -1),
    aten.matmul.default: (X, W.t()), aten.bmm.default: (X, Y.transpose(1, 2)),
    aten.linear.default: (X, W, W[:, 0]), aten.layer_norm.default: (X, [8], W[0], W[1], 1e-5, False),
    aten.conv2d.default: (MAP, torch.randn(6, 1, 3, 3), None, [2, 1], [1, 0], [1, 2], 3),
    aten.batch_norm.default: (MAP, *PER_CHANNEL, False, 0.1, 1e-5, False),
    aten.embedding.default: (W, torch.tensor([[0, 3], [1, 1]]), 2, False, False),
    aten.dropout.default: (X, 0.5, False), aten.view.default: (X, [2, -1, 4]),
    aten.scaled_dot_product_attention.default: (HEADS, HEADS, HEADS, None, 0.0, True),
    aten.reshape.default: (X.transpose(0, 1), [6, -1]), aten.transpose.int: (X, 1, -1),
    aten.permute.default: (X, [2, 0, 1]), aten.unsqueeze.default: (X, 1),
    aten.expand.default: (X[:, :1], [-1, 7, 8]), aten.contiguous.default: (X.transpose(0, 1),),
    aten.flatten.using_ints: (X, 1, -1), aten.select.int: (X, 1, -1),
    aten.where.self: (X > 0, X, Y), aten.sym_size.int: (X, 1),
}  # fmt: skip
KEYWORDS = {
    aten.add.Tensor: {"alpha": 2}, aten.gelu.default: {"approximate": "tanh"},
    aten.scaled_dot_product_attention.default: {"scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("target", BINDINGS, ids=str)
def test_a_binding_computes_what_the_operator_does(target):
    schema = target._schema
    needed = [a for a in schema.arguments if not a.has_default_value()]
    given = ARGUMENTS.get(target, (Y, X) if len(needed) > 1 else (Y,))
    for keywords in ({}, KEYWORDS.get(target, {})):
        graph = fx.Graph()
        graph.output((graph.call_function(target, given, keywords),))
        (got,) = eager_function(fx.GraphModule(nn.Module(), graph))()
        want = target(*given, **keywords)
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))
        if isinstance(want, torch.Tensor):
            assert (got.dtype, got.stride()) == (want.dtype, want.stride())


def test_constants_of_every_kind_are_written():
    kinds = (float("inf"), float("nan"), torch.float64, torch.device("cpu"), None, True, "a'b", 2)

    def seen(x, *given, **named):
        return x, given, named

    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(seen, (x, list(kinds), (slice(1, x, None),)), {"k": {"a": kinds}})
    graph.output((made, x))
    (_, (listed, (part,)), named), _ = eager_function(fx.GraphModule(nn.Module(), graph))(3)
    assert repr(listed) == repr(list(kinds))
    assert (part, repr(named)) == (slice(1, 3, None), repr({"k": {"a": kinds}}))


def outputs_and_gradients(moe, call, training):
    moe.train(training)
    trained = [p for p in moe.parameters() if p.requires_grad]
    torch.manual_seed(3)
    with torch.set_grad_enabled(training):
        made = moe(**call)
        tensors = [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        floats = [t for t in tensors if t.is_floating_point()]
        grads = []
        if training:
            loss = sum(t.square().mean() for t in floats)
            grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return [*tensors, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "ConvNext", "T5"])
def test_the_same_bits_as_block_by_block(monkeypatch, name, training):
    model = architectures.build(name) if name != "T5" else architectures.build_other("T5")
    moe = moe_rewrite.convert(model)
    randomize(moe)
    moe.expand()
    call = architectures.random_call(model, 2)
    ran = []
    applies = FlatCode.applies
    monkeypatch.setattr(FlatCode, "applies", lambda self: ran.append(1) or applies(self))
    flat = outputs_and_gradients(moe, call, training)
    assert ran
    monkeypatch.setattr(FlatCode, "applies", lambda self: False)
    blocks = outputs_and_gradients(moe, call, training)
    assert len(flat) == len(blocks)
    assert all(torch.equal(a, b) for a, b in zip(flat, blocks, strict=True))


def small():
    torch.manual_seed(0)
    model = nn.Sequential(*(networks.Mlp() for _ in range(4))).eval()
    x = torch.randn(2, 5, networks.WIDTH)
    return model, moe_rewrite.convert(model, split=2, example_inputs=x), x


def test_hooks_on_a_block_run():
    _, moe, x = small()
    moe(x)
    seen = []
    handle = moe.deep[0].register_forward_hook(lambda *given: seen.append(given))
    moe(x)
    assert len(seen) == 1
    handle.remove()
    moe(x)
    assert len(seen) == 1


def test_weights_are_those_of_the_moment():
    model, moe, x = small()
    before = moe(x)
    moe.double()
    torch.testing.assert_close(moe(x.double()), before.double(), rtol=1e-5, atol=1e-6)
    moe.float()
    holder = moe.get_submodule("2.up")
    holder.weight = nn.Parameter(holder.weight * 2)
    assert not torch.equal(moe(x), before)


def test_a_copy_has_weights_of_its_own():
    _, moe, x = small()
    before = moe(x)
    other = copy.deepcopy(moe)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(moe(x), before)
    assert not torch.equal(other(x), before)


def test_a_block_that_is_replaced_by_a_forward_of_its_own_runs_it():
    _, moe, x = small()
    moe(x)
    called = []
    forward = moe.deep[0].forward

    def counted(*given):
        called.append(1)
        return forward(*given)

    moe.deep[0].forward = counted
    moe(x)
    assert called
