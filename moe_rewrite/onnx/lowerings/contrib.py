"""ONNX Runtime's own fused operators, com.microsoft.MoE and QMoE.

They take router logits and do softmax and top-k themselves, so only a router of exactly that form
fits: dense softmax, the k largest kept, divided by their sum or not.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError

FITTING = {
    "relu": "relu",
    "gelu_tanh": "gelu",
    "silu": "silu",
    "identity": "identity",
}  # its gelu is the tanh one


def fits(activation: str, gated: bool, top_k: int | None) -> str:
    """Why the operator cannot stand for these experts, or "" where it can."""
    if top_k is None:
        return "a gate over all experts is no top-k"
    if gated and activation != "silu":
        return f"of gated experts only SwiGLU fits, not {activation}"
    if activation not in FITTING:
        return f"activation {activation!r} is none of {', '.join(FITTING)}"
    return ""


def ffn_contrib(
    x_TD: torch.Tensor, logits_TE: torch.Tensor, top_k: int,
    up_EHD: torch.Tensor, down_EDH: torch.Tensor, gate_EHD: torch.Tensor | None = None,
    up_bias_EH: torch.Tensor | None = None, gate_bias_EH: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None, activation: str = "silu", normalize: bool = True,
) -> torch.Tensor:  # fmt: skip
    """(T, D). normalize: the k gates are divided by their sum. Raises ConfigError where the
    operator does not fit."""
    reason = fits(activation, gate_EHD is not None, top_k)
    if reason:
        raise ConfigError(f"com.microsoft.MoE: {reason}")
    first, first_bias = up_EHD, up_bias_EH
    attributes: dict[str, Any] = {
        "k": top_k, "activation_type": FITTING[activation], "normalize_routing_weights": int(normalize),
    }  # fmt: skip
    if gate_EHD is not None:
        first = interleaved(gate_EHD, up_EHD)
        if up_bias_EH is not None and gate_bias_EH is not None:
            first_bias = interleaved(gate_bias_EH, up_bias_EH)
        # x * sigmoid(alpha x) * (y + beta), without a limit on either
        attributes |= {
            "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }  # fmt: skip
    inputs = [x_TD, logits_TE, first, first_bias, down_EDH, down_bias_ED]
    while inputs[-1] is None:
        inputs.pop()
    return torch.onnx.ops.symbolic(
        "com.microsoft::MoE", inputs, attributes, dtype=x_TD.dtype, shape=x_TD.shape, version=1
    )


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(E, 2 H, ...): rows of gate and up in turn."""
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def quantized(weight_ENK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8, scales (E, N)) of weights, symmetric by row; two of 4 bits in a byte.

    Stored values are the signed ones plus 2^(bits-1), as QMoE reads them.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits!r}: expected 4 or 8")
    half = 2 ** (bits - 1)
    scales = weight_ENK.abs().amax(-1) / (half - 1)
    scales = scales.clamp_min(torch.finfo(weight_ENK.dtype).tiny)
    stored = (weight_ENK / scales.unsqueeze(-1)).round().clamp(-half, half - 1) + half
    stored = stored.to(torch.uint8)
    if bits == 4:
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored, scales


def dequantized(stored: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """What `quantized` weights stand for."""
    if bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)
    return (stored.to(scales.dtype) - 2 ** (bits - 1)) * scales.unsqueeze(-1)


def ffn_quantized(
    x_TD: torch.Tensor, logits_TE: torch.Tensor, top_k: int, bits: int,
    first: torch.Tensor, first_scales: torch.Tensor, down: torch.Tensor,
    down_scales: torch.Tensor, swiglu: bool = False, activation: str = "silu",
    normalize: bool = True,
) -> torch.Tensor:  # fmt: skip
    """com.microsoft.QMoE on `quantized` weights. first: of up, or of gate and up `interleaved`."""
    attributes: dict[str, Any] = {
        "k": top_k, "activation_type": "swiglu" if swiglu else FITTING[activation],
        "normalize_routing_weights": int(normalize), "expert_weight_bits": bits,
    }  # fmt: skip
    if swiglu:
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    inputs = [x_TD, logits_TE, first, first_scales, None, down, down_scales]
    return torch.onnx.ops.symbolic(
        "com.microsoft::QMoE", inputs, attributes, dtype=x_TD.dtype, shape=x_TD.shape, version=1
    )
