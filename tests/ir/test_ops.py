"""The operator table: what it says is checked by running the operators."""

import itertools
import operator
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from moe_rewrite.ir.ops import (
    OPS,
    Op,
    alias_root,
    argument,
    first,
    is_pointwise,
    is_random,
    mutated,
    op,
    op_name,
    out_of_place,
    output_of,
    set_argument,
    takes,
)

aten = torch.ops.aten
X = object()  # where a sample's input goes
PACKAGE = Path(__file__).parents[2] / "moe_rewrite"
NO_OPERATOR = {"softsign", "tanhshrink"}  # functions that PyTorch writes with other operators


def t(*shape, seed=1):
    """Multiples of 1/64, which every dtype of these tests holds."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * 64).round() / 64


@dataclass(frozen=True)
class PerChannel:
    """An argument with one value for each channel."""

    tensor: torch.Tensor


class Sample:
    """A call: X is an input of this shape. channels: its dimension, and the result's."""

    def __init__(self, shape, *args, at="default", channels=(1, 1), **kwargs):
        self.shape, self.args, self.kwargs = shape, args, kwargs
        self.at, self.channels = at, channels

    def node(self, name):
        """The call as a node, on an input that is a placeholder."""
        graph = fx.Graph()
        x = graph.placeholder("x")
        args, kwargs = self._filled(x, lambda channel: channel.tensor)
        target = getattr(getattr(aten, name), self.at)
        node = graph.call_function(target, args, kwargs)
        graph.output(node)
        return node

    def run(self, name, x, order=None, seed=0):
        """order: of the channels, in which arguments with a value for each are given."""
        args, kwargs = self._filled(x, lambda c: c.tensor if order is None else c.tensor[order])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(getattr(aten, name), self.at)(*args, **kwargs)

    def _filled(self, x, of_channel):
        def fill(a):
            if isinstance(a, PerChannel):
                return of_channel(a)
            if isinstance(a, torch.Tensor):
                return a.clone()
            return (x.clone() if isinstance(x, torch.Tensor) else x) if a is X else a

        return pytree.tree_map(fill, (self.args, self.kwargs))


def same(names, sample):
    return dict.fromkeys(names.split(), sample)


MAP = (2, 4, 6, 5)
SAMPLES = {
    "linear": Sample((3, 5), X, t(4, 5), torch.zeros(4).double()),
    "addmm": Sample((3, 5), torch.zeros(4).double(), X, t(5, 4)),
    "mm": Sample((3, 5), X, t(5, 4)),
    "matmul": Sample((2, 3, 5), X, t(5, 4)),
    "bmm": Sample((2, 3, 5), X, t(2, 5, 4)),
    "baddbmm": Sample((2, 3, 5), torch.zeros(2, 3, 4).double(), X, t(2, 5, 4)),
    "einsum": Sample((3, 5), "ij,jk->ik", [X, t(5, 4)]),
    "scaled_dot_product_attention": Sample((3, 2, 4, 6), X, X, X, None, 0.5),
    "conv1d": Sample((2, 3, 7), X, t(4, 3, 2)),
    "conv2d": Sample((2, 3, 7, 6), X, t(4, 3, 2, 3)),
    "conv3d": Sample((2, 3, 4, 5, 6), X, t(4, 3, 2, 1, 3)),
    "convolution": Sample(
        (2, 3, 7, 6), X, t(4, 3, 2, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    ),
    "batch_norm": Sample(
        MAP, X, *(PerChannel(t(4, seed=i).abs() + i) for i in range(1, 5)), True, 0.1, 1e-5, False
    ),
    "layer_norm": Sample(
        (2, 3, 4), X, [4], *(PerChannel(t(4, seed=i)) for i in (1, 2)), channels=(2, 2)
    ),
    "rms_norm": Sample((2, 3, 4), X, [4], PerChannel(t(4)), channels=(2, 2)),
    "max_pool2d": Sample(MAP, X, [2, 3], [1, 2]),
    "avg_pool2d": Sample(MAP, X, [2, 3], [1, 2]),
    **same("dropout feature_dropout alpha_dropout", Sample(MAP, X, 0.2, True)),
    "rrelu": Sample(MAP, X, 0.1, 0.9, True),
    "prelu": Sample(MAP, X, PerChannel(t(4))),
    **same(
        "gelu hardswish hardsigmoid mish selu celu relu6 log_sigmoid detach alias lift_fresh_copy "
        "clone contiguous",
        Sample(MAP, X),
    ),
    **same("softmax log_softmax", Sample(MAP, X, 1, at="int")),
    "to": Sample(MAP, X, torch.float32, at="dtype"),
    "_to_copy": Sample(MAP, X, dtype=torch.float32),
    **same("view reshape _unsafe_view", Sample((2, 3, 4), X, [2, 12])),
    "flatten": Sample((2, 3, 4), X, 0, 1, at="using_ints"),
    "unsqueeze": Sample((2, 3), X, 1),
    "squeeze": Sample((2, 1, 3), X, 1, at="dim"),
    "permute": Sample((2, 3, 4), X, [0, 2, 1], channels=(2, 1)),
    "transpose": Sample((2, 3, 4), X, 1, 2, at="int", channels=(1, 2)),
    **same("t numpy_T", Sample((2, 3), X)),
    "slice": Sample((2, 4, 6), X, 2, 1, 5, 2, at="Tensor"),
    "chunk": Sample((2, 6, 3), X, 2, 1),
    "split": Sample((2, 6, 3), X, 2, 1, at="Tensor"),
    "split_with_sizes": Sample((2, 6, 3), X, [1, 5], 1),
    "glu": Sample((2, 6, 3), X, 1),
    **same("new_ones new_zeros new_empty", Sample((2, 3), X, [4])),
    "new_full": Sample((2, 3), X, [4], 7.0),
    **same("zeros_like ones_like empty_like rand_like randn_like sym_numel", Sample((2, 3), X)),
    "full_like": Sample((2, 3), X, 7.0),
    "sym_size": Sample((2, 3), X, 1, at="int"),
    "_assert_scalar": Sample((), 1, "no"),
    "_assert_tensor_metadata": Sample((2, 3), X, [2, 3], [3, 1], torch.float64),
    "sym_constrain_range": Sample((), 3, min=2, max=4),
    "sym_constrain_range_for_size": Sample((), 3, min=2, max=4),
}
SAYS_POSITIONS = {
    "group_norm", "instance_norm", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum",
    "amax", "cat", "pad", "constant_pad_nd",
}  # fmt: skip


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
    """With these arguments a sample's result depends on no random number and no other sample."""
    x = t(*sample.shape)
    others = torch.cat([x[:1], t(*sample.shape, seed=7)[1:]])

    def apart(node):
        state, found = fx.Interpreter(nn.Module(), graph=node.graph), []
        for seed, given in enumerate((x, others)):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found.append(state.run(given)[0])
        return not differs(*found).any()

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


def call(target, *args, **kwargs):
    """A node; args that are strings are placeholders."""
    graph = fx.Graph()
    known = {}

    def fill(a):
        if isinstance(a, str) and a.startswith("%"):
            known[a] = known.get(a) or graph.placeholder(a[1:])
            return known[a]
        return a

    args, kwargs = pytree.tree_map(fill, (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    graph.output(node)
    return node


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


# -- arguments -------------------------------------------------------------------------------------


def test_an_argument_is_found_wherever_it_stands():
    node = call(aten.softmax.int, "%x", -1)
    assert argument(node, "self") is first(node) and argument(node, "dim") == -1
    assert argument(node, "dtype") is None
    assert argument(call(aten.softmax.int, "%x", dim=2), "dim") == 2
    assert argument(call(aten.add.Tensor, "%x", "%y", alpha=3), "alpha") == 3
    assert argument(call(aten.add.Tensor, "%x", "%y"), "alpha") == 1
    assert argument(call(aten.flatten.using_ints, "%x"), "end_dim") == -1
    assert output_of(node.graph) is node


def test_takes_says_whether_an_overload_has_the_argument():
    assert takes(call(aten.to.dtype, "%x", torch.float32), "copy")
    assert not takes(call(aten._to_copy.default, "%x"), "copy")
    assert takes(call(aten.permute.default, "%x", [0]), "dims")
    assert not takes(call(aten.transpose.int, "%x", 0, 1), "dims")


SETTINGS = {
    "positional": (aten.softmax.int, (0,), {}, "dim", 1),
    "left out": (aten.flatten.using_ints, (), {}, "start_dim", 1),
    "left out after others": (aten.flatten.using_ints, (), {}, "end_dim", 1),
    "before others": (aten.flatten.using_ints, (1, 2), {}, "start_dim", 0),
    "keyword": (aten.softmax.int, (), {"dim": 0}, "dim", 2),
    "keyword only": (aten.add.Tensor, (2.0,), {}, "alpha", 3),
    "keyword only, given": (aten.add.Tensor, (2.0,), {"alpha": 5}, "alpha", 3),
    "before a keyword": (aten.flatten.using_ints, (), {"end_dim": 2}, "start_dim", 1),
}


def after_setting(target, args, kwargs, name, setting):
    """What the operator gives after an argument was set, and what it gives if called so."""
    node = call(target, "%x", *args, **kwargs)
    others = {a.name: argument(node, a.name) for a in target._schema.arguments if a.name != name}
    set_argument(node, name, setting)
    assert argument(node, name) == setting
    assert others == {n: argument(node, n) for n in others}
    x, others = t(2, 3, 4), {n: v for n, v in others.items() if n not in ("self", "dtype")}
    found = fx.Interpreter(nn.Module(), graph=node.graph).run(x)
    return found, target(x, **others, **{name: setting})


@pytest.mark.parametrize("case", SETTINGS)
def test_an_argument_that_is_set_counts_and_the_others_stay(case):
    found, expected = after_setting(*SETTINGS[case])
    assert torch.equal(found, expected)


def test_an_argument_can_be_set_after_one_given_by_keyword():
    found, expected = after_setting(aten.flatten.using_ints, (), {"start_dim": 1}, "end_dim", 1)
    assert torch.equal(found, expected)


# -- what is written, and whose memory a value is --------------------------------------------------


def names(nodes):
    return [n.name for n in nodes]


def norm(training, *statistics):
    return call(
        aten.batch_norm.default, "%x", "%w", "%b", *statistics, training, 0.1, 1e-5, False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("node", "written"),
    [
        (call(aten.relu_.default, "%x"), ["x"]),
        (call(aten.add_.Tensor, "%x", "%y"), ["x"]),
        (call(aten.copy_.default, "%x", "%y"), ["x"]),
        (call(aten.add.out, "%x", "%y", out="%z"), ["z"]),
        (call(aten.relu.default, "%x"), []),
        (call(aten.view.default, "%x", [2]), []),
        (call(torch.relu_, "%x"), []),
        (norm(True, "%m", "%v"), ["m", "v"]),
        (norm(False, "%m", "%v"), []),
        (norm(True, None, None), []),
    ],
)
def test_what_a_node_writes_to(node, written):
    assert names(mutated(node)) == written
    assert mutated(next(iter(node.graph.nodes))) == []


def test_a_call_of_our_own_says_itself_what_it_writes():
    class Call:
        __name__ = "call"

        def writes(self, node):
            return list(node.all_input_nodes[1:])

        def __call__(self, *args):
            pass

    assert names(mutated(call(Call(), "%x", "%y"))) == ["y"]


@pytest.mark.parametrize(
    ("target", "args", "plain"),
    [
        (aten.relu_.default, (), aten.relu.default),
        (aten.add_.Tensor, (2.0,), aten.add.Tensor),
        (aten.mul_.Scalar, (2.0,), aten.mul.Scalar),
        (aten.clamp_.default, (-0.5, 0.5), aten.clamp.default),
        (aten.relu.default, (), None),
        (torch.relu_, (), None),
    ],
)
def test_the_operator_that_gives_the_same_in_memory_of_its_own(target, args, plain):
    assert out_of_place(call(target, "%x", *args)) is plain
    if plain is not None:
        x = t(2, 3)
        before = x.clone()
        y = plain(x, *args)
        assert torch.equal(x, before) and torch.equal(target(x, *args), y)


def test_an_alias_is_followed_through_views_and_writes_in_place():
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.mul.Tensor, (x, 2.0))
    shown = graph.call_function(aten.view.default, (made, [3, 2]))
    turned = graph.call_function(aten.transpose.int, (shown, 0, 1))
    part = graph.call_function(aten.slice.Tensor, (turned, 0, 0, 1))
    written = graph.call_function(aten.relu_.default, (part,))
    again = graph.call_function(aten.add_.Tensor, (written, 1.0))
    own = graph.call_function(aten.add.Tensor, (again, 1.0))
    assert {alias_root(n) for n in (made, shown, turned, part, written, again)} == {made}
    assert alias_root(own) is own and alias_root(x) is x
    assert alias_root(graph.call_function(aten.view.default, (x, [6]))) is x


def test_an_alias_is_followed_through_the_parts_of_what_is_split():
    graph = fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(aten.chunk.default, (x, 2, 1))
    part = graph.call_function(operator.getitem, (parts, 0))
    assert alias_root(part) is x


# -- no other file knows an argument's place -------------------------------------------------------


def places_of_arguments(text):
    return re.findall(r"\bargs\[\s*-?\d+", text)


def test_the_search_finds_what_it_is_for():
    made_up = "x = node.args[0]\ny = args[-1]\nz = use.node.args[ 12 ]\nw = args[place], kwargs[0]"
    assert places_of_arguments(made_up) == ["args[0", "args[-1", "args[ 12"]


def test_no_other_file_knows_the_place_of_an_argument():
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "ir" / "ops.py"]
    assert len(files) > 100
    assert not [f.name for f in files if places_of_arguments(f.read_text())]
