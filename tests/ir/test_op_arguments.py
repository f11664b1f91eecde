"""Arguments of operators by name, what is written, and whose memory a value is."""

import operator
import re
from pathlib import Path

import pytest
import torch
from op_samples import call, t
from torch import fx, nn

from moe_rewrite.ir.ops import (
    alias_root,
    argument,
    first,
    mutated,
    out_of_place,
    output_of,
    set_argument,
    takes,
)

aten = torch.ops.aten
PACKAGE = Path(__file__).parents[2] / "moe_rewrite"


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


def test_a_region_writes_to_what_its_operations_write_to():
    """Also through views."""

    class Regions(torch.nn.Module):
        def forward(self, x, a, b, c):
            with torch.no_grad():
                a.mul_(2)
                b.view(-1)[:2].add_(x.sum() + c.sum())
            return x * a * b * c

    given = torch.zeros(3), *(torch.ones(3) for _ in range(3))
    graph = torch.export.export(Regions(), given, strict=False).graph
    regions = [n for n in graph.nodes if "set_grad_enabled" in str(n.target)]
    assert {w.name for r in regions for w in mutated(r)} == {"a", "b"}


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
