"""The operator table: what it says is checked by running the operators."""

import itertools
from dataclasses import fields

import pytest
import torch
from op_samples import SAMPLES, SAYS_POSITIONS, call, t
from torch import fx, nn
from torch.utils import _pytree as pytree

from moe_rewrite.ir.ops import (
    OPS,
    Op,
    argument,
    is_pointwise,
    is_random,
    op,
    op_name,
    set_argument,
    takes,
)

aten = torch.ops.aten
NO_OPERATOR = {"softsign", "tanhshrink"}  # functions that PyTorch writes with other operators


# -- checks, one for each thing that an entry can say ----------------------------------------------


def outputs(made):
    return list(made) if isinstance(made, (list, tuple)) else [made]


def differs(a, b):
    return ~torch.isclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def one_element(sample, place):
    x = t(*sample.shape)
    changed = x.clone()
    changed[place] *= 1.5  # of one sign, since rrelu draws a number for each negative one
    return x, changed


def places(sample, count=9):
    every = list(itertools.product(*map(range, sample.shape)))
    return every[:: max(1, len(every) // count)]


def check_pointwise(name, sample):
    seen = 0
    for place in places(sample):
        a, b = (sample.run(name, x) for x in one_element(sample, place))
        moved = differs(a, b)
        seen += int(moved.sum())
        moved[place] = False
        assert not moved.any()
    assert seen, "no change was seen at all"


def check_rows(name, sample):
    """Of merged dimensions the order is kept; of others a row gives a row."""
    x = t(*sample.shape)
    y = sample.run(name, x)
    if OPS[name].rows == "merged":
        assert torch.equal(y.flatten(), x.flatten())
        return
    for row in range(len(x)):
        changed = x.clone()
        changed[row] += t(*x.shape[1:], seed=5)
        moved = differs(y, sample.run(name, changed)).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == [row]


def check_channels(name, sample):
    """Channels in another order give results in that order; of random ones, each gives its own."""
    x, (inside, outside) = t(*sample.shape), sample.channels
    y, count = sample.run(name, x), sample.shape[inside]
    if is_random(sample.node(name)):
        for channel in range(count):
            changed = x.clone()
            changed.select(inside, channel).add_(1.5)
            moved = differs(y, sample.run(name, changed)).movedim(outside, 0).flatten(1).any(1)
            assert moved.nonzero().flatten().tolist() == [channel]
        return
    order = torch.arange(count).roll(1)
    turned = sample.run(name, x.index_select(inside, order), order)
    torch.testing.assert_close(turned, y.index_select(outside, order))
    assert differs(turned, y).any()


def check_sizes_only(name, sample):
    a, b = (sample.run(name, t(*sample.shape, seed=i)) for i in (1, 2))
    if "empty" in name:  # whose values are anybody's
        a, b = ((r.shape, r.dtype) for r in (a, b))
        assert a == b
    else:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def check_cast(name, sample):
    x = t(*sample.shape)
    assert torch.equal(sample.run(name, x).to(x), x)


def check_check(name, sample):
    assert sample.run(name, t(*sample.shape)) is None


def check_view(name, sample):
    x = t(*sample.shape)
    y = sample.run(name, x)
    assert y.shape != x.shape and torch.equal(y.flatten(), x.flatten())


def check_along(name, sample):
    """What is taken lies on the same line along that dimension."""
    dim = argument(sample.node(name), OPS[name].along)
    for place in places(sample):
        a, b = (outputs(sample.run(name, x)) for x in one_element(sample, place))
        for one, other in zip(a, b, strict=True):
            for at in differs(one, other).nonzero().tolist():
                assert at[:dim] == list(place[:dim]) and at[dim + 1 :] == list(place[dim + 1 :])
    short = [y.shape[dim] < sample.shape[dim] for y in outputs(sample.run(name, t(*sample.shape)))]
    assert all(short)


def check_normalized(name, sample):
    sizes = argument(sample.node(name), OPS[name].normalized)
    outer = len(sample.shape) - len(sizes)
    for place in places(sample):
        a, b = (sample.run(name, x) for x in one_element(sample, place))
        moved = differs(a, b)
        assert moved[place[:outer]].sum() > 1, "nothing else was normalized with it"
        moved[place[:outer]] = False
        assert not moved.any()


def check_transposes(name, sample):
    x = t(*sample.shape)
    y, orders = sample.run(name, x), itertools.permutations(range(x.ndim))
    assert any(y.shape == x.permute(o).shape and torch.equal(y, x.permute(o)) for o in orders)


def check_evaluation(name, sample):
    """With these arguments a sample's result depends on no random number and no other sample, and
    no statistics are written."""
    x = t(*sample.shape)
    others = torch.cat([x[:1], t(*sample.shape, seed=7)[1:]])

    def apart(node):
        state, found = fx.Interpreter(nn.Module(), graph=node.graph), []
        before = [argument(node, n).clone() for n in statistics]
        for seed, given in enumerate((x, others)):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found.append(state.run(given)[0])
        after = [argument(node, n) for n in statistics]
        return not differs(*found).any() and all(map(torch.equal, before, after))

    _, statistics = OPS[name].statistics
    node = sample.node(name)
    assert not apart(node), "the sample shows nothing"
    for argument_, setting in OPS[name].evaluation.items():
        set_argument(node, argument_, setting)
    assert apart(node)


def check_statistics(name, sample):
    flag, written = OPS[name].statistics
    for on in (True, False):
        node = sample.node(name)
        set_argument(node, flag, on)
        tensors = {n: argument(node, n) for n in ("weight", "bias", *written)}
        before = {n: v.clone() for n, v in tensors.items()}
        fx.Interpreter(nn.Module(), graph=node.graph).run(t(*sample.shape))
        moved = {n for n in tensors if not torch.equal(tensors[n], before[n])}
        assert moved == (set(written) if on else set())


def check_product(name, sample):
    x, node, kind = t(*sample.shape), sample.node(name), OPS[name].product
    y = sample.run(name, x)
    if kind == "linear":
        expected = x @ argument(node, "weight").T
    elif kind == "matmul":
        expected = x @ argument(node, "other" if takes(node, "other") else "mat2")
    else:  # it is linear in its input, and a filter sums over all but a weight's outputs
        expected = 2 * y
        y = sample.run(name, 2 * x)
        if kind == "filter":
            weight = argument(node, "weight")
            window = torch.ones_like(weight)
            set_argument(node, "weight", window)
            ones = fx.Interpreter(nn.Module(), graph=node.graph).run(torch.ones_like(x))
            assert (ones == weight[0].numel()).all()
    torch.testing.assert_close(y, expected)


def check_summed(name, sample):
    """Products of ones count the terms of each sum."""
    node = sample.node(name)
    assert argument(node, OPS[name].summed).op == "placeholder"  # it is the sample's input
    size = sample.shape[-1]
    ones = pytree.tree_map_only(torch.Tensor, lambda a: (a != 0).to(a), (node.args, node.kwargs))
    node.args, node.kwargs = ones
    y = fx.Interpreter(nn.Module(), graph=node.graph).run(torch.ones(sample.shape).double())
    assert (y == size).all() and size not in y.shape[-1:]


def check_fresh(name, sample):
    x = t(*sample.shape)
    node = sample.node(name)
    y = fx.Interpreter(nn.Module(), graph=node.graph).run(x)
    given = [x, *(a for a in pytree.tree_leaves(node.args) if isinstance(a, torch.Tensor))]
    assert y.untyped_storage().data_ptr() not in {a.untyped_storage().data_ptr() for a in given}


CHECKS = {
    "pointwise": check_pointwise, "rows": check_rows, "channels": check_channels,
    "sizes_only": check_sizes_only, "cast": check_cast, "check": check_check, "view": check_view,
    "along": check_along, "normalized": check_normalized, "transposes": check_transposes,
    "evaluation": check_evaluation, "statistics": check_statistics, "product": check_product,
    "summed": check_summed, "fresh": check_fresh,
}  # fmt: skip


def said(name):
    """What an entry says, by the field."""
    plain = Op()
    return [f.name for f in fields(Op) if getattr(OPS[name], f.name) != getattr(plain, f.name)]


CLAIMS = [(n, f) for n in OPS if n in SAMPLES for f in said(n) if f != "positions"]


@pytest.mark.parametrize(("name", "field"), CLAIMS)
def test_operators_do_what_the_table_says(name, field):
    CHECKS[field](name, SAMPLES[name])


def test_each_entry_has_a_sample_or_says_of_positions_alone():
    """Those are run in tests/analysis/test_spatial.py."""
    assert set(OPS) == {*SAMPLES, *SAYS_POSITIONS, *(NO_OPERATOR & set(OPS))}
    assert all(said(name) == ["positions"] for name in SAYS_POSITIONS)


def test_each_thing_that_can_be_said_has_a_check():
    assert {f.name for f in fields(Op)} == {*CHECKS, "positions"}


@pytest.mark.parametrize(
    ("name", "field"),
    [("softmax", "pointwise"), ("linear", "pointwise"), ("matmul", "view"), ("gelu", "cast"),
     ("detach", "fresh"), ("gelu", "sizes_only"), ("gelu", "transposes")],
)  # fmt: skip
def test_a_check_fails_where_it_is_not_so(name, field):
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        CHECKS[field](name, SAMPLES[name])


@pytest.mark.parametrize(
    ("name", "args"),
    [("_assert_scalar", (0, "no")), ("sym_constrain_range_for_size", (5,)),
     ("sym_constrain_range", (5,)), ("_assert_tensor_metadata", (torch.ones(2), [3]))],
)  # fmt: skip
def test_what_only_checks_raises(name, args):
    limits = {"min": 2, "max": 4} if name.startswith("sym") else {}
    with pytest.raises(RuntimeError):
        getattr(aten, name).default(*args, **limits)


# -- names -----------------------------------------------------------------------------------------


def test_each_name_is_an_operator():
    assert {n for n in OPS if not hasattr(aten, n) and not hasattr(aten, n + "_")} <= NO_OPERATOR


def named(of):
    """The arguments that an entry names."""
    flag, written = of.statistics
    return filter(None, (*of.evaluation, flag, *written, of.summed, of.along, of.normalized))


@pytest.mark.parametrize(("name", "given"), [(n, a) for n, of in OPS.items() for a in named(of)])
def test_each_argument_is_one_of_the_operator(name, given):
    packet = getattr(aten, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    assert any(given in {a.name for a in schema.arguments} for schema in schemas)


@pytest.mark.parametrize(
    ("target", "name"),
    [(aten.linear.default, "linear"), (aten.add_.Tensor, "add"), (aten.relu_.default, "relu"),
     (aten._to_copy.default, "_to_copy"), (aten.view.dtype, "view")],
)  # fmt: skip
def test_an_operator_goes_by_one_name(target, name):
    assert op_name(call(target, "%x")) == name


def test_nothing_is_known_of_what_is_no_operator_of_the_table():
    for target in (aten.view.dtype, aten.cumsum.default, torch.nn.functional.linear, torch.relu):
        assert op(call(target, "%x")) == Op()
    assert op(call(aten.view.default, "%x")).view


def test_pointwise_is_what_pytorch_or_the_table_says():
    for target in (aten.add.Tensor, aten.silu_.default, aten.gelu.default, aten.where.self):
        assert is_pointwise(call(target, "%x"))
    for target in (aten.linear.default, aten.softmax.int, aten.sum.default, torch.add):
        assert not is_pointwise(call(target, "%x"))


def test_random_is_what_draws_numbers():
    assert is_random(call(aten.dropout.default, "%x", 0.5, True))
    assert is_random(call(aten.rand_like.default, "%x"))
    assert not is_random(call(aten.relu.default, "%x"))
    assert not is_random(call(torch.add, "%x"))
