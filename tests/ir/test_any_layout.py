"""Views that may copy, and those that something writes through."""

import pytest
import torch
from torch import fx

from moe_rewrite.ir.any_layout import allow_any_layout

aten = torch.ops.aten
WRITTEN = ["the view", "its source", "another view", "a part of it"]


def graph(written=None):
    """x + 1, viewed as a line twice; with what is written to in place."""
    made = fx.Graph()
    source = made.call_function(aten.add.Tensor, (made.placeholder("x"), 1))
    views = [made.call_function(aten.view.default, (source, [-1])) for _ in range(2)]
    part = made.call_function(aten.slice.Tensor, (views[0], 0, 0, 2))
    target = dict(zip(WRITTEN, (views[0], source, views[1], part), strict=True)).get(written)
    if target is not None:
        made.call_function(aten.mul_.Tensor, (target, 2))
    made.output((source, views[0]))
    allow_any_layout(made)
    return made


def run(made, x):
    return fx.GraphModule(torch.nn.Module(), made)(x)


def names(made):
    return {n.target for n in made.nodes if n.target in (aten.view.default, aten.reshape.default)}


def test_what_nothing_writes_to_may_be_copied():
    made = graph()
    assert names(made) == {aten.reshape.default}
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 1).expand(3, 4)):
        whole, line = run(made, x)
        assert torch.equal(whole, x + 1) and torch.equal(line, (x + 1).reshape(-1))


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_written_through_stays_a_view(written):
    made = graph(written)
    assert names(made) == {aten.view.default}
    x = torch.randn(3, 4)
    whole, line = run(made, x)
    assert torch.equal(whole.flatten(), line) and not torch.equal(whole, x + 1)
