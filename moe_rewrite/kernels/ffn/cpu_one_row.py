"""Feed-forward experts for a single row on the CPU, as a decoded token is: nothing is sorted, and each
matrix is read once.

K experts of the row, D width, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from .activations import activate
from .cpu_plan import Weights, combine


def forward(
    x_1D: torch.Tensor, gates_1K: torch.Tensor, experts_1K: torch.Tensor, w: Weights,
    activation: str, joined: bool,
) -> torch.Tensor:  # fmt: skip
    """(1, D). joined: `up` holds the gate's rows before its own. An expert outside 0 .. E-1 adds
    nothing."""
    chosen = experts_1K[0].tolist()
    kept = [k for k, e in enumerate(chosen) if 0 <= e < len(w.up)]
    experts, given = [chosen[k] for k in kept], [x_1D[0]] * len(kept)
    lifted = _products(w.up, w.up_bias, experts, given)
    if joined:
        gating, lifted = lifted.chunk(2, 1)
        act = activate(activation, gating, torch.empty_like(lifted)).mul_(lifted)
    elif len(w.gate):
        gating = _products(w.gate, w.gate_bias, experts, given)
        act = activate(activation, gating, gating).mul_(lifted)
    else:
        act = activate(activation, lifted, lifted)
    y = _products(w.down, w.down_bias, experts, act.unbind())
    gates = gates_1K if len(kept) == len(chosen) else gates_1K[:, kept]
    return combine(y, torch.arange(len(kept)).unsqueeze(0), gates)


def _products(weights: Any, biases: Any, experts: list[int], given: Any) -> torch.Tensor:
    """(K, outputs): each given vector through its expert's linear map."""
    made = weights[0].new_empty(len(experts), weights[0].shape[0])
    for e, own, out in zip(experts, given, made.unbind(), strict=True):
        if len(biases):
            torch.addmv(biases[e], weights[e], own, out=out)
        else:
            torch.mv(weights[e], own, out=out)
    return made
