"""Sparse: one branch an expert that gathers its rows, runs them and adds them to their places.

NonZero, Gather, MatMul, ScatterND: an expert without a row runs products of no rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import hidden
from .dense import weights_of


def ffn_sparse(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor,
    up_EHD: torch.Tensor, down_EDH: torch.Tensor, gate_EHD: torch.Tensor | None = None,
    up_bias_EH: torch.Tensor | None = None, gate_bias_EH: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None, activation: str = "silu",
) -> torch.Tensor:  # fmt: skip
    """(T, D); shapes as in `ffn_dense`. As many branches as there are experts."""
    gates_TE = weights_of(gates_TK, experts_TK, up_EHD.shape[0])
    out_TD = torch.zeros_like(x_TD)

    def part(of: torch.Tensor | None, e: int) -> torch.Tensor | None:
        return None if of is None else of[e]

    for e in range(up_EHD.shape[0]):
        rows = gates_TE[:, e].nonzero()[:, 0]
        x = x_TD.index_select(0, rows)
        up = F.linear(x, up_EHD[e], part(up_bias_EH, e))
        gate = None if gate_EHD is None else F.linear(x, gate_EHD[e], part(gate_bias_EH, e))
        y = F.linear(hidden(up, gate, activation), down_EDH[e], part(down_bias_ED, e))
        y = y * gates_TE[:, e].index_select(0, rows).unsqueeze(1).to(y.dtype)
        out_TD = out_TD.index_put((rows,), y, accumulate=True)
    return out_TD
