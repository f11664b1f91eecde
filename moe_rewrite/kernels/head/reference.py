"""Classification columns appended to a head, in plain PyTorch.

B batch, S positions (of a head that runs on all of them, before one is taken; else none), D width,
C classes, E experts.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

MANY = 16  # experts with equally many columns, from which on they are one product

Columns = tuple[torch.Tensor, torch.Tensor, int] | int


def append_columns(
    logits_BSC: torch.Tensor,
    x_BSD: torch.Tensor,
    columns: list[Columns],
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

    def weighed_at_once(group: list[tuple[torch.Tensor, torch.Tensor, int]]) -> torch.Tensor:
        weights, biases, places = zip(*group, strict=True)
        logits = F.linear(x_BSD, torch.cat(weights), torch.cat(biases))
        if gates is None:
            return logits
        apart = logits.unflatten(-1, (len(group), -1)).log_softmax(-1)
        own = gates[:, [place + 1 for place in places]]
        return (apart + own.view(len(own), *(1,) * (logits.ndim - 2), -1, 1)).flatten(-2)

    parts = [weighed(logits_BSC, 0)]
    for count, alike in groupby(columns, _count):
        group: list[Any] = list(alike)
        if count is None:
            sizes = ((*logits_BSC.shape[:-1], n) for n in group)
            parts += [logits_BSC.new_full(size, float("-inf")) for size in sizes]
        elif len(group) >= MANY and not torch.compiler.is_compiling():
            parts.append(weighed_at_once(group))
        else:
            parts += [weighed(F.linear(x_BSD, w, b), place + 1) for w, b, place in group]
    return torch.cat(parts, dim=-1)


def _count(columns: Columns) -> int | None:
    """Of an expert's columns; None where they are of inactive ones."""
    return None if isinstance(columns, int) else len(columns[1])
