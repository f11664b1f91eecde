"""Converted models on the kernels: what they give without, forward and backward."""

from unittest.mock import Mock

import cnns
import networks
import pytest
import torch
from reference import randomize

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter
from moe_rewrite.kernels import triton
from moe_rewrite.kernels.ffn import launch as ffn_launch
from moe_rewrite.kernels.lora import launch as lora_launch
from moe_rewrite.kernels.lora import stacked
from moe_rewrite.kernels.patches import launch as patches_launch

KERNELS = {
    "lora": (lora_launch, "low_rank"), "feed-forward": (ffn_launch, "forward"),
    "regions": (patches_launch, "gather"),
}  # fmt: skip


def converted(kind, device):
    if kind == "regions":
        model, x = cnns.build("ResNet").to(device), torch.randn(2, 3, 16, 16).to(device)
        router, experts = PatchRouter(4, 3, init=1.0), RegionExperts(halo=False)
        return x, moe_rewrite.convert(
            model, split="layer3", router=router, experts=experts, num_experts=2,
            example_inputs=x, verify=False,
        )  # fmt: skip
    model = networks.Network(["Mlp", "Mlp"]).eval()
    x, example = model.input(2, 5).to(device), model.input(2, 6).to(device)
    experts = FFNExperts() if kind == "feed-forward" else LoRAExperts(rank=4)
    return x, moe_rewrite.convert(
        model.to(device), split=1, router=TokenRouter(top_k=2, base=False, init=1.0),
        experts=experts, num_experts=3, backend="dense" if kind == "lora" else "grouped",
        example_inputs=example, verify=False,
    )  # fmt: skip


def results(moe, x):
    moe.zero_grad()
    y = moe(x)
    y.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | grads


@pytest.mark.parametrize("kind", ["lora", "feed-forward", "regions"])
def test_a_model_gives_the_same_on_the_kernels(kind, device, monkeypatch):
    torch.manual_seed(0)
    x, moe = converted(kind, device)
    if kind != "regions":
        randomize(moe)
    moe.eval()
    launch, name = KERNELS[kind]
    with monkeypatch.context() as patched:
        patched.setattr(stacked, "fuses", lambda *_: True)  # so few rows would take plain products
        run = Mock(wraps=getattr(launch, name))
        patched.setattr(launch, name, run)
        on = results(moe, x)
    assert run.called
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    off = {n: t.to(device) for n, t in results(moe.cpu(), x.cpu()).items()}
    assert len(off) > 4 and on.keys() == off.keys()
    for name, expected in off.items():
        torch.testing.assert_close(on[name], expected, rtol=1e-4, atol=1e-4, msg=name)
