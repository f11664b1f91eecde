"""Classification columns behind a head, in plain PyTorch. B batch, D width, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def append_columns(
    logits_BC: torch.Tensor, x_BD: torch.Tensor, columns: list[tuple[torch.Tensor, ...] | int]
) -> torch.Tensor:
    """The logits with the experts' columns behind; minus infinity in those of experts that are off,
    so that classes keep their places."""
    parts = [logits_BC]
    for column in columns:
        if isinstance(column, int):
            size = (*logits_BC.shape[:-1], column)
            parts.append(logits_BC.new_full(size, float("-inf")))
        else:
            parts.append(F.linear(x_BD, *column))
    return torch.cat(parts, dim=-1) if columns else logits_BC
