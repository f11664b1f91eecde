"""Sizes of the blocks of the kernels' products: by few bucketed keys, not tuned to an input.

benchmarks/kernels.py compiles what they give ahead of time, for sm_80 and sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .triton import capability


class TileSizes(NamedTuple):
    """M x N: a program's part of the output; depth: what it multiplies at a time."""

    m: int
    n: int
    depth: int
    warps: int
    stages: int


ROWS = (16, 32, 64, 128)  # buckets of rows of a group


def bucket(rows: float) -> int:
    """The smallest of ROWS that holds so many rows, or the largest."""
    return next((m for m in ROWS if rows <= m), ROWS[-1])


def aligned(*sizes: int) -> bool:
    """Whether rows of these widths and strides begin where the chip loads 16 values at once.

    Others are loaded value by value, which takes registers: their blocks are smaller.
    """
    return all(n % 16 == 0 for n in sizes)


def product(x: torch.Tensor, rows: float, wide: bool, accumulators: int = 1) -> TileSizes:
    """Blocks of a product with about so many rows a group and so many sums held at once; wide:
    whether what it reads and writes is `aligned`."""
    m = bucket(rows)
    if x.dtype == torch.float32:  # no matrix units without loss of precision
        return TileSizes(min(m, 32), 64, 16, 4, 2)
    if not wide:
        return TileSizes(min(m, 64), 64, 32, 8 if m >= 64 else 4, 2)
    if m < 128:
        return TileSizes(m, 128 // accumulators if m == 64 else 128, 64, 4, 3 if m == 64 else 4)
    if capability(x) >= 9:  # a warp group multiplies from shared memory
        return TileSizes(128, 256 // accumulators, 64, 8, 4)
    return TileSizes(128, 128 // accumulators, 32, 8, 3)


def activated(x: torch.Tensor, rows: float, wide: bool, gated: bool, biased: bool) -> TileSizes:
    """Blocks of a product, or two, whose epilogue adds biases and applies the activation."""
    size = product(x, rows, wide, 2 if gated else 1)
    most = 64 if gated and biased else 128
    return size._replace(n=min(size.n, most)) if size.m == 128 else size


def ranks(rank: int) -> int:
    """Ranks that the epilogue of a linear map takes at a time."""
    return 16 if rank <= 16 else 32


def gradient(x: torch.Tensor, wide: bool) -> TileSizes:
    """Blocks of a weight's gradient: depth is over rows."""
    if x.dtype == torch.float32:
        return TileSizes(64, 64, 16, 8, 2)
    if not wide:
        return TileSizes(64, 64, 32, 8, 2)
    return TileSizes(128, 256, 64, 8, 4) if capability(x) >= 9 else TileSizes(128, 128, 32, 8, 3)
