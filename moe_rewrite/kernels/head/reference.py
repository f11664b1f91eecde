"""Classification columns appended to a head, in plain PyTorch.

B batch, S positions (of a head that runs on all of them, before one is taken; else none), D width,
C classes, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def append_columns(
    logits_BSC: torch.Tensor,
    x_BSD: torch.Tensor,
    columns: list[tuple[torch.Tensor, torch.Tensor, int] | int],
    gates_BE: torch.Tensor | None,
) -> torch.Tensor:
    """The logits with the experts' columns appended.

    With gates, ``log p(c) = log g_e + log softmax_e(c)``: the router decides which expert's classes
    a sample belongs to, and each expert (the head, with the frozen model's gate) decides among its
    own. So no column has to be calibrated against columns that it was not trained with. Without
    gates, columns are plain logits.

    columns: (weight, bias, index among the active experts), or the number of columns of an inactive
        expert: these are minus infinity, so that classes keep their positions.
    gates_BE: (B, 1 + E) log of the gates, the frozen model's first, or None.
    """
    if not columns:
        return logits_BSC
    gates = None if gates_BE is None else gates_BE.to(logits_BSC.dtype)

    def weighed(logits: torch.Tensor, place: int) -> torch.Tensor:
        if gates is None:
            return logits
        return logits.log_softmax(-1) + gates[:, place].view(-1, *(1,) * (logits.ndim - 1))

    parts = [weighed(logits_BSC, 0)]
    for column in columns:
        if isinstance(column, int):
            size = (*logits_BSC.shape[:-1], column)
            parts.append(logits_BSC.new_full(size, float("-inf")))
        else:
            weight, bias, place = column
            parts.append(weighed(F.linear(x_BSD, weight, bias), place + 1))
    return torch.cat(parts, dim=-1)
