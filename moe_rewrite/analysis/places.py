"""The words of `spatial`: where a value has positions and channels, and why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.aten import expression, value


@dataclass(frozen=True)
class SpatialDims:
    """The dimensions of a value that hold rows, columns and channels; dimension 0 is the batch."""

    rows: int = 2
    cols: int = 3
    channels: int = 1


@dataclass(frozen=True)
class OfSample:
    """A value that a sample has once, made of all its positions; dimension 0 is the batch."""


class NotLocal(Exception):
    """An operation that does not keep positions; the message says why."""


Place = SpatialDims | OfSample
SpatialMap = dict[fx.Node, Place | str]
Known = Mapping[fx.Node, Place | str]
NCHW = SpatialDims()


def channel_dim(place: Place, node: fx.Node) -> int | None:
    """The dimension of a value that has its channels. Of a value that a sample has once, the only
    one besides the batch that is not 1; None if there are several."""
    if isinstance(place, SpatialDims):
        return place.channels
    sizes: list[Any] = [expression(s) for s in value(node).shape]
    wide = [i for i, size in enumerate(sizes) if i and size != 1]
    return None if len(wide) > 1 else next(iter(wide), 1)
