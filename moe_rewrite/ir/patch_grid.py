"""A g x g grid over a map, and over every other map that a region computes from it.

Patch i of an axis of length L covers positions ``i * L // g .. (i + 1) * L // g``: every position
belongs to one patch and, where g <= L, no patch is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


def bounds(length: int, grid: int) -> list[tuple[int, int]]:
    """(first, last + 1) position of each patch along an axis."""
    return [(i * length // grid, (i + 1) * length // grid) for i in range(grid)]


def largest(length: int, grid: int) -> int:
    """Positions of the largest patch along an axis."""
    return -(-length // grid)


@dataclass(frozen=True)
class Span:
    """The positions of a value that one patch needs along an axis.

    For patch positions o .. o + p - 1 of the region's exit these are ``stride * o + low`` to
    ``stride * (o + p - 1) + high``.
    """

    stride: int = 1
    low: int = 0
    high: int = 0

    def size(self, patch: int) -> int:
        return self.stride * (patch - 1) + self.high - self.low + 1

    def starts(self, length: int, grid: int) -> torch.Tensor:
        """(g,) first position for each patch of an exit of this length; it may be negative."""
        firsts = torch.tensor([start for start, _ in bounds(length, grid)])
        return self.stride * firsts + self.low


@dataclass(frozen=True)
class Table:
    """The positions of each of n patches in a map that is flattened to H * W.

    rows, cols: size of a patch.
    positions: (n, rows * cols) int64.
    inside: (n, rows, cols) bool, False where a position does not belong to the patch (outside the
        map, or of a neighbouring patch); None if all do.
    """

    rows: int
    cols: int
    positions: torch.Tensor
    inside: torch.Tensor | None


def table(
    starts: tuple[torch.Tensor, torch.Tensor],
    sizes: tuple[int, int],
    limits: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    width: int,
) -> Table:
    """The table of g x g patches.

    starts: for each axis, (g,) first position of each patch.
    sizes: positions taken along each axis.
    limits: for each axis, (g,) first position inside each patch, and (g,) last + 1.
    width: of the map.
    """
    rows, cols = (s[:, None] + torch.arange(n) for s, n in zip(starts, sizes, strict=True))
    inside_rows, inside_cols = (
        (x >= low[:, None]) & (x < high[:, None])
        for x, (low, high) in zip((rows, cols), limits, strict=True)
    )
    g = len(starts[0])
    inside = inside_rows[:, None, :, None] & inside_cols[None, :, None, :]
    inside = inside.reshape(g * g, *sizes)
    rows, cols = (
        x.clamp(low[:, None], high[:, None] - 1)
        for x, (low, high) in zip((rows, cols), limits, strict=True)
    )
    positions = rows[:, None, :, None] * width + cols[None, :, None, :]
    return Table(*sizes, positions.reshape(g * g, -1), None if bool(inside.all()) else inside)


@lru_cache
def patches(height: int, width: int, grid: int) -> Table:
    """The patches of a map, each padded at the bottom and right to the largest one's size."""
    limits = tuple(
        (torch.tensor([a for a, _ in b]), torch.tensor([z for _, z in b]))
        for b in (bounds(height, grid), bounds(width, grid))
    )
    sizes = largest(height, grid), largest(width, grid)
    return table((limits[0][0], limits[1][0]), sizes, limits, width)  # type: ignore[arg-type]


def windows(
    exit_size: tuple[int, int], grid: int, spans: tuple[Span, Span], size: tuple[int, int]
) -> Table:
    """The positions of a value of this size that each patch of a region's exit needs; those outside
    the map are not `inside`."""
    starts = tuple(s.starts(n, grid) for s, n in zip(spans, exit_size, strict=True))
    sizes = tuple(s.size(largest(n, grid)) for s, n in zip(spans, exit_size, strict=True))
    limits = tuple((torch.zeros(grid, dtype=torch.long), torch.full((grid,), n)) for n in size)
    return table(starts, sizes, limits, size[1])  # type: ignore[arg-type]


@lru_cache
def shares(length: int, grid: int) -> torch.Tensor:
    """(length, g) fp32: the share of each patch in each position of an axis. On an axis at least as
    long as the grid one patch has all of a position; on a shorter one, patches share it evenly."""
    weights = torch.zeros(length, grid)
    if length >= grid:
        for patch, (first, stop) in enumerate(bounds(length, grid)):
            weights[first:stop, patch] = 1.0
        return weights
    for position in range(length):
        first, stop = position * grid // length, -(-(position + 1) * grid // length)
        weights[position, first:stop] = 1.0 / (stop - first)
    return weights
