"""Routes and plans in plain PyTorch: the reference that every kernel is compared with.

T rows, E experts, K experts a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """The (row, choice) pairs sorted by expert. A pair's number is ``row * K + choice``.

    order: (T * K,) int64, the pairs of expert 0 first, each expert's in rising order; dropped pairs
        (expert outside 0 .. E-1) after all others.
    offsets: (E + 1,) int64; expert e has ``order[offsets[e] : offsets[e + 1]]``.
    inverse: (T * K,) int64, the index of each pair in `order`.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    inverse: torch.Tensor


def route(
    logits_TE: torch.Tensor, k: int, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates_TK, experts_TK int64): softmax over all experts, then each row's k largest.

    Gates are fp32 (fp64 of fp64 logits) in falling order, divided by their sum if `normalize`
    (Mixtral, arXiv 2401.04088, section 2.1; else Switch, arXiv 2101.03961, equation 2). Of equal
    logits, the lower index comes first.
    """
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    experts = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if normalize:  # the softmax of the chosen is the softmax of all over its sum
        return logits.gather(-1, experts).softmax(-1), experts
    return logits.softmax(-1).gather(-1, experts), experts


def sort_plan(experts_TK: torch.Tensor, num_experts: int) -> Plan:
    """The plan of token choice: a stable sort by expert."""
    flat = experts_TK.reshape(-1)
    flat = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)
    of, order = flat.sort(stable=True)
    offsets = torch.searchsorted(of, torch.arange(num_experts + 1, device=of.device))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Plan(order, offsets, inverse)
