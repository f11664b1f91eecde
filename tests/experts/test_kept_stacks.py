"""What a site gives a graph is of its parameters as they are, however they were changed."""

import copy

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts


def written(site, e):
    site.b[e].add_(1.0)


def moved(site, e):
    site.b[e].data = torch.full_like(site.b[e], 3.0)


def replaced(site, e):
    site.a[e] = nn.Parameter(torch.full_like(site.a[e], 2.0), requires_grad=False)


def listed(site, e):
    site.a = nn.ParameterList(p.detach() + 1 for p in site.a)


def copied(site, e):
    return copy.deepcopy(site)


def cast(site, e):
    site.double()


def mode(site, e):
    site.train(not site.training)


CHANGES = [written, moved, replaced, listed, copied, cast, mode]


def whole(site, active):
    """As a graph that computes in the parameters' own dtype is to have it."""
    dtype = site.computes["a"]
    a, b = ([getattr(site, part)[e].detach().to(dtype) for e in active] for part in ("a", "b"))
    return torch.cat(a), torch.cat(b, 1)


@pytest.fixture(scope="module")
def made():
    moe = moe_rewrite.convert(architectures.build("Llama", layers=2), num_experts=3)
    return moe.eval().expert_sites()[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 2)), min_size=1, max_size=8),
       st.sampled_from([(0,), (2,), (0, 1), (0, 2), (0, 1, 2)]))  # fmt: skip
@torch.no_grad()
def test_changes_of_every_kind_are_seen(made, changes, active):
    site, others = copy.deepcopy(made), None
    for change, expert in changes:
        for asked in (active, active, others or (1,)):
            for found, want in zip(site.stacked(asked), whole(site, asked), strict=True):
                assert torch.equal(found, want)
        others, site = active, change(site, expert) or site
    for found, want in zip(site.stacked(active), whole(site, active), strict=True):
        assert torch.equal(found, want)


def test_gradients_flow_after_a_call_without():
    moe = moe_rewrite.convert(
        architectures.build("Llama", layers=2), experts=LoRAExperts(rank=2), num_experts=2
    )
    moe.eval()
    ids = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        moe(input_ids=ids)
    moe(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None for site in moe.expert_sites() for p in site.b)


def test_with_no_expert_on_a_model_computes_what_the_dense_one_does():
    dense = architectures.build("Llama")
    moe = moe_rewrite.convert(dense, split=1, num_experts=2).eval()
    ids = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        for site in moe.expert_sites():
            for b in site.b:
                b.normal_()
        with moe.disable_experts():
            assert torch.equal(moe(input_ids=ids).logits, dense(input_ids=ids).logits)
