"""Classification columns appended to a head, in plain PyTorch.

B batch, D width, C classes, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def append_columns(
    logits_BC: torch.Tensor,
    x_BD: torch.Tensor,
    columns: list[tuple[torch.Tensor, torch.Tensor, int] | int],
    gates_B1E: torch.Tensor | None,
) -> torch.Tensor:
    """The logits with the experts' columns appended.

    With gates, ``log p(c) = log g_e + log softmax_e(c)``: the router decides which expert's classes
    a sample belongs to, and each expert (the head, with the frozen model's gate) decides among its
    own. So no column has to be calibrated against columns that it was not trained with. Without
    gates, columns are plain logits.

    columns: (weight, bias, index among the active experts), or the number of columns of an inactive
        expert: these are minus infinity, so that classes keep their positions.
    gates_B1E: log of the gates, the frozen model's first, or None.
    """
    if not columns:
        return logits_BC
    gates = None if gates_B1E is None else gates_B1E.to(logits_BC.dtype)

    def weighed(logits: torch.Tensor, place: int) -> torch.Tensor:
        return logits if gates is None else logits.log_softmax(-1) + gates[:, place, None]

    parts = [weighed(logits_BC, 0)]
    for column in columns:
        if isinstance(column, int):
            size = (*logits_BC.shape[:-1], column)
            parts.append(logits_BC.new_full(size, float("-inf")))
        else:
            weight, bias, place = column
            parts.append(weighed(F.linear(x_BD, weight, bias), place + 1))
    return torch.cat(parts, dim=-1)
