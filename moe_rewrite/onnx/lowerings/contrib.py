"""ONNX Runtime's own fused operators, com.microsoft.MoE and QMoE (of int8 or int4 weights).

They take router logits and do softmax and top-k themselves, so the logarithms of the gates are
passed as logits: their softmax is the gates divided by their sum, and the k largest are the nonzero
ones. This works for any gates with at most k nonzero a row, if the output is multiplied by their
sum.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from ...errors import ConfigError
from ..trace.ffn_placeholder import Routing, TracedFeedForward
from .builder import Builder
from .site import Site

ACTIVATIONS = {
    "relu": "relu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity",
}  # fmt: skip  # its gelu is the tanh approximation
SWIGLU: dict[str, Any] = {  # x * sigmoid(alpha x) * (y + beta), without a limit on either
    "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
    "activation_beta": 0.0,
}  # fmt: skip
SMALL = 1e-38  # gates are clamped to this before the logarithm


def misfit(call: TracedFeedForward, routing: Routing, bits: int | None = None) -> str:
    """Why the operator cannot compute these experts; empty if it can."""
    form = call.form
    if routing.top_k is None:
        return "experts choose their rows: there is no bound on experts a row"
    if form is None:
        return "the region computes none of the fused forms"
    if form.gate is not None and form.activation != "silu":
        return f"the only gated form that fits is SwiGLU, not {form.activation}"
    if form.activation not in ACTIVATIONS:
        return f"activation {form.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
    return ""


def contrib(build: Builder, site: Site, bits: int | None = None) -> ir.Value:
    """One MoE node, or QMoE with `bits` 4 or 8; its stacks of weights go into `build.weights`."""
    form, k = site.call.form, min(site.top_k or 0, len(site.weights))
    assert form is not None and k
    op = build.op
    total = op("ReduceSum", site.gates, build.constant([1]), keepdims=1)
    small = op("CastLike", build.constant(SMALL, "float32"), site.gates)
    logits = op("Log", op("Max", op("Div", site.gates, total), small))
    given = [[site.tensors[str(w.name)] for w in own] for own in site.weights]
    stacks = {n: t for n, t in _stacks(site.call, given).items() if t is not None}
    attributes: dict[str, Any] = {"k": k, "normalize_routing_weights": 1}
    attributes |= SWIGLU if form.gate else {"activation_type": ACTIVATIONS[form.activation]}
    names = ["first", "first_bias", "down", "down_bias"]
    if bits is not None:
        attributes["expert_weight_bits"] = bits
        for name in ("first", "down"):
            stacks[name], stacks[f"{name}_scales"] = quantized(stacks[name], bits)
        names = ["first", "first_scales", "first_bias", "down", "down_scales", "down_bias"]
    inputs = [build.weight(n, stacks[n]) if n in stacks else None for n in names]
    while inputs[-1] is None:
        inputs.pop()
    kind = "MoE" if bits is None else "QMoE"
    y = op(kind, site.x, logits, *inputs, domain="com.microsoft", **attributes)
    return op("Mul", y, total)


def _stacks(
    call: TracedFeedForward, weights: list[list[torch.Tensor]]
) -> dict[str, torch.Tensor | None]:
    """first: (E, H, D), or (E, 2 H, D) with interleaved rows of gate and up; down: (E, D, H)."""
    up, down, gate, up_bias, gate_bias, down_bias = (
        p if p is None else torch.stack(list(p)) for p in call.parts(weights)
    )
    assert up is not None
    first, first_bias = up, up_bias
    if gate is not None:
        first = interleaved(gate, up)
        if up_bias is not None or gate_bias is not None:
            no = up.new_zeros(up.shape[:2])
            first_bias = interleaved(
                no if gate_bias is None else gate_bias, no if up_bias is None else up_bias
            )
    return {"first": first, "first_bias": first_bias, "down": down, "down_bias": down_bias}


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(E, 2 H, ...): rows of gate and up, interleaved."""
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def quantized(weight_ENK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8, scales (E, N)): symmetric quantization by row; two 4-bit values a byte.

    Stored are the signed values plus 2^(bits-1), as QMoE reads them. Raises ConfigError for an odd
    last dimension with 4 bits.
    """
    if bits == 4 and weight_ENK.shape[-1] % 2:
        raise ConfigError(
            f"int4 weights of shape {tuple(weight_ENK.shape)}: expected an even last size; use int8"
        )
    stored, scales = _rounded(weight_ENK, bits)
    stored = (stored + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored, scales


def _rounded(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    scales = weight.abs().amax(-1) / (half - 1)
    scales = scales.clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scales.unsqueeze(-1)).round().clamp(-half, half - 1), scales


def dequantized(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight after quantization by row (along its last dimension) and back."""
    stored, scales = _rounded(weight, bits)
    return stored * scales.unsqueeze(-1)
