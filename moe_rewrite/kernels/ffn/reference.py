"""Feed-forward experts in plain PyTorch: the reference that every kernel is compared with.

T rows, D width, H hidden width, E experts, K experts a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
}
Stack = torch.Tensor | Sequence[torch.Tensor]


def ffn(
    x_TD: torch.Tensor,
    up_HD: torch.Tensor,
    down_DH: torch.Tensor,
    gate_HD: torch.Tensor | None = None,
    up_bias_H: torch.Tensor | None = None,
    gate_bias_H: torch.Tensor | None = None,
    down_bias_D: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """One expert: ``down(act(gate x) * (up x))`` (GLU, arXiv 2002.05202), or ``down(act(up x))``
    without a gate."""
    act = ACTIVATIONS[activation]
    hidden = F.linear(x_TD, up_HD, up_bias_H)
    if gate_HD is None:
        hidden = act(hidden)
    else:
        hidden = act(F.linear(x_TD, gate_HD, gate_bias_H)) * hidden
    return F.linear(hidden, down_DH, down_bias_D)


def ffn_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    up_EHD: Stack,
    down_EDH: Stack,
    gate_EHD: Stack | None = None,
    up_bias_EH: Stack | None = None,
    gate_bias_EH: Stack | None = None,
    down_bias_ED: Stack | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """``y_t = sum_k gates[t, k] * FFN_{experts[t, k]}(x_t)``, every expert on every row.

    A choice outside 0 .. E-1 adds nothing.
    """
    given = (up_EHD, down_EDH, gate_EHD, up_bias_EH, gate_bias_EH, down_bias_ED)
    y = torch.zeros_like(x_TD)
    for e in range(len(up_EHD)):
        gate_T1 = (gates_TK * (experts_TK == e)).sum(-1, keepdim=True).to(x_TD.dtype)
        y = y + gate_T1 * ffn(x_TD, *(w if w is None else w[e] for w in given), activation)  # type: ignore[arg-type, call-arg]
    return y
