"""Classification columns behind a head, in plain PyTorch. B batch, D width, C classes, E experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def append_columns(
    logits_BC: torch.Tensor,
    x_BD: torch.Tensor,
    columns: list[tuple[torch.Tensor, torch.Tensor, int] | int],
    gates_B1E: torch.Tensor | None,
) -> torch.Tensor:
    """The logits with the experts' columns behind, each expert's plus the log of its gate: a class
    of an expert that the router does not choose for a sample is no answer to it.

    columns: (weight, bias, place of the expert among those that are on), or how many columns an
    expert that is off has: they are minus infinity, so that classes keep their places.
    gates_B1E: log of each gate over the sample's largest, the frozen model's first; None to weigh
    nothing.
    """
    if not columns:
        return logits_BC
    gates = None if gates_B1E is None else gates_B1E.to(logits_BC.dtype)
    parts = [logits_BC if gates is None else logits_BC + gates[:, :1]]
    for column in columns:
        if isinstance(column, int):
            size = (*logits_BC.shape[:-1], column)
            parts.append(logits_BC.new_full(size, float("-inf")))
        else:
            weight, bias, place = column
            logits = F.linear(x_BD, weight, bias)
            parts.append(logits if gates is None else logits + gates[:, place + 1, None])
    return torch.cat(parts, dim=-1)
