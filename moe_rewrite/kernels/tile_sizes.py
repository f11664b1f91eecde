"""Tile sizes of the kernels' products, by a few bucketed keys instead of autotuning per input.

`benchmarks/speed/kernels.py` compiles every variant ahead of time, for sm_80 and sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .triton import capability


class TileSizes(NamedTuple):
    """m x n: a program's tile of the output. depth: elements a step along the summed dimension."""

    m: int
    n: int
    depth: int
    warps: int
    stages: int


ROWS = (16, 32, 64, 128)  # buckets of rows of a group


def bucket(rows: float) -> int:
    """The smallest of ROWS that is at least `rows`, or else the largest."""
    return next((m for m in ROWS if rows <= m), ROWS[-1])


def aligned(*sizes: int) -> bool:
    """Whether rows of these widths and strides start at multiples of 16 values, for vector loads.

    Other rows are loaded value by value, which takes registers: their tiles are smaller.
    """
    return all(n % 16 == 0 for n in sizes)


def product(x: torch.Tensor, rows: float, wide: bool, accumulators: int = 1) -> TileSizes:
    """Tile sizes of a product.

    rows: mean rows of a group.
    wide: whether what it reads and writes is `aligned`.
    accumulators: tiles of sums that a program holds.
    """
    m = bucket(rows)
    if x.dtype == torch.float32:  # no matrix units without loss of precision
        return TileSizes(min(m, 32), 64, 16, 4, 2)
    if not wide:
        return TileSizes(min(m, 64), 64, 32, 8 if m >= 64 else 4, 2)
    if m < 128:
        return TileSizes(m, 128 // accumulators if m == 64 else 128, 64, 4, 3 if m == 64 else 4)
    if capability(x) >= 9:  # wgmma: a warp group multiplies operands in shared memory
        return TileSizes(128, 256 // accumulators, 64, 8, 4)
    return TileSizes(128, 128 // accumulators, 32, 8, 3)


def activated(x: torch.Tensor, rows: float, wide: bool, gated: bool, biased: bool) -> TileSizes:
    """Tile sizes of one or two products whose epilogue adds biases and applies the activation."""
    size = product(x, rows, wide, 2 if gated else 1)
    most = 64 if gated and biased else 128
    return size._replace(n=min(size.n, most)) if size.m == 128 else size


def ranks(rank: int) -> int:
    """Ranks that the epilogue of a linear map processes at a time."""
    return 16 if rank <= 16 else 32


def gradient(x: torch.Tensor, wide: bool) -> TileSizes:
    """Tile sizes of a weight's gradient; depth is along rows."""
    if x.dtype == torch.float32:
        return TileSizes(64, 64, 16, 8, 2)
    if not wide:
        return TileSizes(64, 64, 32, 8, 2)
    return TileSizes(128, 256, 64, 8, 4) if capability(x) >= 9 else TileSizes(128, 128, 32, 8, 3)
