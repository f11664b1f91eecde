"""Models that several benchmarks measure, and steps of training them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter


def llama(
    layers: int, width: int, hidden: int | None = None, heads: int = 8, vocabulary: int = 1024
) -> Any:
    """A Llama with random weights, on the device that is the default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden or width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def llama_with_experts(
    layers: int, width: int, experts: int, fit: Literal["gradient", "analytic"] = "gradient"
) -> MoEModel:
    """LoRA experts on the deep half that came one by one: the newest is trained, the older ones are
    frozen; none is zero. fit: of the router."""
    router = TokenRouter(granularity="prefix", fit=fit)
    moe = moe_rewrite.convert(llama(layers, width), split=layers // 2, router=router)
    assert isinstance(moe, MoEModel)
    for _ in range(experts - 1):
        moe.expand()
    for index in range(experts):
        moe.activate(index)
    with torch.no_grad():
        for site in moe.expert_sites():
            for b in site.parameter_lists()[1]:
                b.normal_(0, 0.02)
        for row in moe.router.rows:
            row.normal_(0, 0.02)
    return moe


def training_step(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def with_backward(
    run: Callable[[], torch.Tensor], gradient: torch.Tensor, leaves: Iterable[torch.Tensor] = ()
) -> Callable[[], None]:
    """Forward and backward; the leaves' gradients of the call before are dropped."""
    leaves = list(leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().backward(gradient)

    return both
