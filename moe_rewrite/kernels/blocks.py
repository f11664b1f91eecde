"""Sizes of the blocks of the kernels' products: by few bucketed keys, not tuned to an input.

The same list is what tests/test_kernel_builds.py compiles ahead of time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
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


def product(rows: float, dtype: torch.dtype, accumulators: int = 1) -> Blocks:
    """Blocks of a product with about so many rows a group and so many sums held at once."""
    m = bucket(rows)
    if dtype == torch.float32:  # no matrix units without loss of precision
        return Blocks(min(m, 64), 64, 32, 4, 2)
    if m == 128:
        return Blocks(128, 256 // accumulators, 64, 8, 3)
    return Blocks(m, 128, 64, 4, 3 if m == 64 else 4)


def gradient(dtype: torch.dtype) -> Blocks:
    """Blocks of a weight's gradient: depth is over rows."""
    if dtype == torch.float32:
        return Blocks(64, 64, 32, 4, 2)
    return Blocks(128, 128, 64, 8, 3)
