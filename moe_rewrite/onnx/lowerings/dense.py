"""Dense: every expert runs on every row; what it gives is multiplied by its gate, zero included.

Shapes as in `ffn_experts`: T rows, D width, H hidden, E experts, K experts a row.
"""

from __future__ import annotations

import torch

from .activations import hidden


def ffn_dense(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor,
    up_EHD: torch.Tensor, down_EDH: torch.Tensor, gate_EHD: torch.Tensor | None = None,
    up_bias_EH: torch.Tensor | None = None, gate_bias_EH: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None, activation: str = "silu",
) -> torch.Tensor:  # fmt: skip
    """(T, D). Two batched products over all experts: no shape depends on data."""
    gates_TE = weights_of(gates_TK, experts_TK, up_EHD.shape[0])

    def product(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        y = x @ w.transpose(1, 2)
        return y if b is None else y + b.unsqueeze(1)

    x_1TD = x_TD.unsqueeze(0)
    up_ETH = product(x_1TD, up_EHD, up_bias_EH)
    gate_ETH = None if gate_EHD is None else product(x_1TD, gate_EHD, gate_bias_EH)
    y_ETD = product(hidden(up_ETH, gate_ETH, activation), down_EDH, down_bias_ED)
    return (y_ETD * gates_TE.t().unsqueeze(-1).to(y_ETD.dtype)).sum(0)


def weights_of(gates_TK: torch.Tensor, experts_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, E): each row's gate of each expert, zero where it was not chosen."""
    zeros = gates_TK.new_zeros(gates_TK.shape[0], experts)
    return zeros.scatter_add(1, experts_TK, gates_TK)
