"""Caches of which a trace is given one tensor for all of equal sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

import moe_rewrite
from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.frontend.caches import cache_leaves
from moe_rewrite.frontend.capture import capture
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from tests.frontend.tracing.test_fake_results import described
from tests.helpers import architectures
from tests.helpers.sweeps import some


@pytest.fixture(scope="module", autouse=True)
def caches_have_leaves():
    """As for every Hugging Face model that is captured."""
    register_cache_pytrees_for_model(architectures.build("Llama"))


def filled(widths, batch=2, length=5, heads=2):
    """A cache. widths: of the keys and values of each layer."""
    cache = DynamicCache()
    for i, (keys, values) in enumerate(widths):
        made = (torch.randn(batch, heads, length, width) for width in (keys, values))
        cache.update(*made, i)
    return cache


class Reading(nn.Module):
    """Adds up what the layers of a cache hold, but for those left out."""

    def __init__(self, left_out=(), writes=False, branches=None):
        super().__init__()
        self.linear, self.left_out = nn.Linear(4, 4), left_out
        self.writes, self.branches = writes, branches

    def forward(self, x, past_key_values):
        x = self.linear(x)
        for i, layer in enumerate(past_key_values.layers):
            if i in self.left_out:
                continue
            if self.writes:
                layer.keys.mul_(2)
            x = x + layer.keys.sum((1, 2, 3))[:, None] * (i + 1) + layer.values.mean() * (i + 5)
            if i == self.branches and layer.keys.sum() > 0:
                x = -x
        return x


def program_of(model, cache):
    return capture(
        host_of(structural_copy(model)), {"x": torch.randn(2, 4), "past_key_values": cache}, "eval"
    )


ALIKE, MIXED = [(3, 3)] * 4, [(3, 5), (3, 5), (7, 3), (3, 7)]


@pytest.mark.parametrize("widths", [ALIKE, MIXED, [(3, 3)]], ids=["alike", "mixed", "one layer"])
@pytest.mark.parametrize("left_out, writes", [((), False), ((0,), False), ((1, 3), True)])
def test_the_graph_is_that_of_all_tensors(widths, left_out, writes, monkeypatch):
    model = Reading(left_out, writes)
    ours = program_of(model, filled(widths))
    monkeypatch.setattr(cache_leaves, "_grows", lambda given: False)
    plain = program_of(model, filled(widths))
    assert described(ours) == described(plain)
    assert list(ours.names("cache")) and ours.names("cache") == plain.names("cache")
    assert [n.name for n in ours.leaves()] == [n.name for n in plain.leaves()]
    assert str(ours.in_spec) == str(plain.in_spec)
    assert len(pytree.tree_leaves(filled(widths))) == len(ours.leaves("cache"))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_branch_on_a_layers_values_asks_that_layer(layer):
    cache = filled(ALIKE)
    for i, one in enumerate(cache.layers):
        one.keys = one.keys.abs() * (1 if i == layer else -1)
    program = program_of(Reading(branches=layer), cache)
    (number,) = program.values
    leaves = [torch.randn(2, 4), *pytree.tree_leaves(cache)]
    assert number.leaves == (1 + 2 * layer,) and number.of(leaves)
    assert any(n.target is torch.ops.aten.neg.default for n in program.graph.nodes)


@pytest.mark.parametrize("name", some(["Llama", "Gemma3", "GPT2", "Falcon"], {"Gemma3"}))
def test_layers_of_unequal_lengths_are_refused(name):
    moe = moe_rewrite.convert(architectures.build(name), num_experts=2)
    ids = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        cache = moe(input_ids=ids, use_cache=True).past_key_values
        moe(input_ids=ids[:, :1], past_key_values=cache)
        layer = cache.layers[1]
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        with pytest.raises(MoeRewriteError):
            moe(input_ids=ids[:, :1], past_key_values=cache)
