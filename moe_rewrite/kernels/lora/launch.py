"""The launch of the low-rank kernel."""

from __future__ import annotations

import torch

from .. import tile_sizes
from ..triton import ceil_div, precision
from . import kernel

GROUP = 8


def low_rank(
    x_TC: torch.Tensor, w_NC: torch.Tensor, low_TR: torch.Tensor, b_NR: torch.Tensor
) -> torch.Tensor:
    """(T, N) = x w^T + low b^T; w and b may be transposed views."""
    x = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    (rows, depth), width, rank = x.shape, w_NC.shape[0], low_TR.shape[1]
    size = tile_sizes.product(x, rows, tile_sizes.aligned(depth, width, x.stride(0)))
    ranks = tile_sizes.ranks(rank)
    y = x.new_empty(rows, width)
    bound = ceil_div(rows, size.m)
    kernel.low_rank_kernel[(bound * ceil_div(width, size.n),)](
        x, w_NC, low_TR, b_NR, y, rows, width, depth, rank, bound, x.stride(0), *w_NC.stride(),
        *b_NR.stride(), EVEN=depth % size.depth == 0, EVEN_R=rank % ranks == 0,
        PRECISION=precision(x.dtype), M=size.m, N=size.n, BLOCK=size.depth, RANKS=ranks,
        GROUP=GROUP, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return y
