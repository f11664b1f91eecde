"""Many LoRA experts with few rows each, as batched products over rows that are padded to the most that
an expert has: a loop over the experts would be calls and little else.

T rows, D input width, O output width, E experts of rank r, S pairs of a row and an expert, n experts
with rows, c the most rows of one.
"""

from __future__ import annotations

import torch

MANY = 8  # experts with rows, from which on a loop over them takes longer
PADDING = 4  # padded rows by pairs, at most


def fits(offsets_E1: torch.Tensor) -> bool:
    """Whether the experts' rows are alike enough in number."""
    counts = offsets_E1.diff()
    busy = int((counts > 0).sum())
    return busy >= MANY and int(counts.max()) * busy <= PADDING * int(
        offsets_E1[-1] - offsets_E1[0]
    )


def add_padded(
    y_TO: torch.Tensor, x_TD: torch.Tensor, rows_S: torch.Tensor, gates_S1: torch.Tensor,
    offsets_E1: torch.Tensor, a_ErD: torch.Tensor, b_OEr: torch.Tensor, rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Add ``gate * B_e A_e x`` of every pair to its row of y, in place. rows, gates: of the pairs,
    sorted by expert. Returns (pairs (P,), their ``A_e x`` (P, r))."""
    counts = offsets_E1.diff()
    busy_n = counts.nonzero().flatten()
    counts_n1, first_n1 = counts[busy_n].unsqueeze(1), offsets_E1[busy_n].unsqueeze(1)
    place_c = torch.arange(int(counts.max()), device=counts.device)
    real_nc = place_c < counts_n1
    pairs_nc = first_n1 + torch.minimum(place_c, counts_n1 - 1)
    shape = (*pairs_nc.shape, -1)
    flat = pairs_nc.flatten()
    x_ncD = x_TD.index_select(0, rows_S.index_select(0, flat)).view(shape)
    a_nrD = a_ErD.view(-1, rank, a_ErD.shape[1]).index_select(0, busy_n)
    b_nrO = b_OEr.view(len(b_OEr), -1, rank).permute(1, 2, 0).index_select(0, busy_n)
    low_ncr = torch.bmm(x_ncD, a_nrD.mT)
    gates_nc1 = gates_S1.index_select(0, flat).view(shape)
    out_ncO = torch.bmm(low_ncr * gates_nc1, b_nrO)
    kept = real_nc.flatten().nonzero().flatten()
    pairs = flat.index_select(0, kept)
    y_TO.index_add_(0, rows_S.index_select(0, pairs), out_ncO.flatten(0, 1).index_select(0, kept))
    return pairs, low_ncr.flatten(0, 1).index_select(0, kept)
