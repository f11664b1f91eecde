"""The feed-forward kernels as one of transformers' forms of experts, beside eager and grouped_mm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
from ...kernels.autocast import autocasts
from ...kernels.ffn.op import ffn_experts
from ...kernels.plan.op import sort_plan
from ...kernels.triton import runs_on

__all__ = ["register_experts"]

NAME = "moe_rewrite"
# names of transformers' activations and of ours
ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "relu2": "relu2", "quick_gelu": "quick_gelu", "linear": "identity",
}  # fmt: skip
OF_CLASS: dict[type, str] = {}  # the class of transformers' activation -> the name of ours


def register_experts() -> str:
    """Make `experts_implementation="moe_rewrite"` known to transformers, and return the name.

    Then `from_pretrained(folder, experts_implementation="moe_rewrite")`, or
    `model.set_experts_implementation("moe_rewrite")`, for every model whose experts take
    transformers' forms (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, ...). Outputs and gradients are those
    of eager experts up to rounding; products are accumulated in fp32.

    Experts with one of this package's activations run in one op. Others (gates of their own, as
    gpt-oss has, norms after an expert, autocast) run on the CPU as one product an expert on rows
    that are sorted once. Elsewhere, and while torch.export traces, they run as grouped_mm.

    Raises InputError where transformers has no forms of experts (before 5.0).
    """
    try:
        from transformers.activations import ACT2FN
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise InputError(
            f"register_experts(): transformers has no forms of experts ({error}): expected "
            "transformers 5 or later, pip install -U transformers"
        ) from error
    OF_CLASS.update({type(ACT2FN[name]): own for name, own in ACTIVATIONS.items()})
    ExpertsInterface.register(NAME, experts_forward)
    return NAME


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A layer's experts on their rows. self: the module, as use_experts_implementation makes it.

    hidden_states (T, D), top_k_index (T, K) of integers, top_k_weights (T, K); (T, D) in the dtype
    of hidden_states. An index that is no expert's adds nothing (expert parallelism marks rows of
    other processes so).
    """
    on_cpu = hidden_states.device.type == "cpu"
    activation = _fused_activation(self, hidden_states)
    experts = top_k_index.long()
    if not torch.compiler.is_exporting():
        if activation and (on_cpu or (runs_on(hidden_states) and not self.is_transposed)):
            up = self.gate_up_proj if self.has_gate else self.up_proj
            biases = (None, None)
            if self.has_bias:
                up_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
                biases = up_bias, self.down_proj_bias
            return ffn_experts(
                hidden_states, top_k_weights, experts, None, _matrices(self, up),
                _matrices(self, self.down_proj), None, biases[0], None, biases[1],
                activation, joined=self.has_gate,
            )  # fmt: skip
        if on_cpu and not torch.compiler.is_compiling():
            return _one_product_an_expert(self, hidden_states, experts, top_k_weights)
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def _fused_activation(layer: Any, x: torch.Tensor) -> str | None:
    """The name of the activation if the fused op computes what the layer does, else None."""
    from transformers.integrations.moe import _default_apply_gate

    gated_as_usual = not layer.has_gate or (
        layer.is_concatenated and type(layer)._apply_gate is _default_apply_gate
    )
    if not gated_as_usual or layer.has_post_expert_norm or autocasts(x.device.type):
        return None
    if any(w.dtype != x.dtype for w in layer._parameters.values()):
        return None
    return OF_CLASS.get(type(getattr(layer, "act_fn", None)))


def _matrices(layer: Any, weights: torch.Tensor) -> torch.Tensor:
    """(E, outputs, inputs) of a layer's weights."""
    return weights.transpose(1, 2) if layer.is_transposed else weights


def _one_product_an_expert(
    layer: Any, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The layer's own gate, activation and norm on rows that are sorted by expert."""
    k = experts_TK.shape[-1]
    plan = sort_plan(experts_TK, layer.num_experts)
    ends = plan.offsets.tolist()
    sizes = [hi - lo for lo, hi in pairwise(ends)]
    kept = plan.order[: ends[-1]]
    first = "gate_up_proj" if layer.has_gate else "up_proj"
    hidden = _products(layer, first, x_TD[kept // k], sizes)
    hidden = layer._apply_gate(hidden) if layer.has_gate else layer.act_fn(hidden)
    y = _products(layer, "down_proj", hidden, sizes)
    if layer.has_post_expert_norm:
        y = layer.post_expert_norm(y)
    y = y * gates_TK.reshape(-1)[kept].unsqueeze(-1)
    of_pairs = y.new_zeros(experts_TK.numel(), y.shape[-1]).index_copy(0, kept, y)
    return of_pairs.view(*experts_TK.shape, y.shape[-1]).sum(1).to(x_TD.dtype)


def _products(layer: Any, name: str, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Each expert's linear map of its rows."""
    weights = _matrices(layer, getattr(layer, name)).unbind()  # one gradient for all experts
    biases = getattr(layer, f"{name}_bias").unbind() if layer.has_bias else [None] * len(weights)
    parts = [
        F.linear(own, weight, bias)
        for own, weight, bias in zip(rows.split(sizes), weights, biases, strict=True)
        if len(own)
    ]
    return torch.cat(parts) if parts else F.linear(rows, weights[0], biases[0])
