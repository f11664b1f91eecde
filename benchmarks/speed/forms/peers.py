"""Other libraries' layers of feed-forward experts."""

from __future__ import annotations

import torch


def transformers_experts(
    k: int, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor
) -> torch.nn.Module:
    """transformers' layer with these weights; its form is config._experts_implementation."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, width = up.shape
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts,
        num_experts_per_tok=k, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    peer = Qwen3MoeExperts(config).to(up.device, up.dtype)
    both = torch.cat([gate, up], 1).detach()
    peer.load_state_dict({"gate_up_proj": both, "down_proj": down.detach()})
    return peer
