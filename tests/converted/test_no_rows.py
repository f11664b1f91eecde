"""Calls without samples, or without positions: what the dense model gives, and no gradients."""

import cnns
import networks
import pytest
import torch
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter

TOKENS = {
    "token": {"router": TokenRouter(granularity="token", top_k=1, gate="all", init=0.5)},
    "sequence": {"router": TokenRouter(granularity="sequence", base=True)},
    "prefix": {"router": TokenRouter(granularity="prefix")},
    "analytic": {"router": TokenRouter(granularity="prefix", fit="analytic"), "num_experts": 1},
    "expert choice": {"router": TokenRouter(granularity="token", policy="expert", base=False)},
    "feed-forward": {"mode": "upcycle"},
    "feed-forward at the cut": {"experts": FFNExperts(router="cut"), "router": "token"},
}
MAPS = {
    "patches": {"router": PatchRouter(grid=2, features="flat")},
    "selected patches": {"router": PatchRouter(grid=2, per_expert=1, gate="selected")},
    "pooled patches": {"router": PatchRouter(grid=2, features="pooled")},
    "samples": {"router": TokenRouter(granularity="sequence")},
    "regions": {"router": PatchRouter(grid=2), "experts": RegionExperts()},
}


def assert_as_dense(model, moe, x):
    randomize(moe)
    for mode in (False, True):
        model.train(mode)
        moe.train(mode)
        out = moe(x)
        assert out.shape == model(x).shape and out.dtype == model(x).dtype
        out.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in moe.parameters())
    moe.eval()


@pytest.mark.filterwarnings("ignore:the router knows no rows of what the model did before")
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("case", TOKENS)
def test_of_tokens(case, shape):
    model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    options = {"num_experts": 2, "batch_norm": "frozen"} | TOKENS[case]
    moe = moe_rewrite.convert(model, split=1, example_inputs=model.input(2, 6), **options)
    assert_as_dense(model, moe, model.input(*shape))


@pytest.mark.filterwarnings("ignore:the experts take")
@pytest.mark.parametrize("case", MAPS)
def test_of_maps(case):
    model = cnns.build("ResNet").eval()
    options = {"num_experts": 2, "experts": LoRAExperts()} | MAPS[case]
    x = torch.randn(2, 3, 16, 16)
    moe = moe_rewrite.convert(model, split=2, example_inputs=x, **options)
    assert_as_dense(model, moe, x[:0])


def test_an_operation_that_takes_no_empty_map_has_a_graph_of_its_own():
    """local_response_norm branches on it, which a trace with samples does not see."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.LocalResponseNorm(2), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers, nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    moe = moe_rewrite.convert(model, split=1, example_inputs=x)
    assert_as_dense(model, moe, x[:0])
    with moe.disable_experts():
        torch.testing.assert_close(moe(x), model(x))
