"""Convolutions as products: over a line, a map or a volume, and transposed ones."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.aten import value
from ..ir.ops import argument, op_name, takes

TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


def per_axis(given: Any, axes: int) -> list[int]:
    """An option of a convolution or a pooling, as one number an axis."""
    given = [given] if isinstance(given, int) else list(given)
    return given * axes if len(given) == 1 else given


def axes_of(node: fx.Node) -> int:
    """How many axes a convolution moves along."""
    return value(argument(node, "weight")).ndim - 2


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is a transposed one, whose weight is stored as (in, out, ...)."""
    general = takes(node, "transposed") and argument(node, "transposed")
    return bool(general) or op_name(node) in TRANSPOSED


def options_of(node: fx.Node) -> tuple[Any, ...]:
    """Stride, padding and dilation of a convolution; of a transposed one the output's padding too,
    which tells the two apart."""
    axes, padding = axes_of(node), argument(node, "padding")
    stride, dilation = (per_axis(argument(node, name), axes) for name in ("stride", "dilation"))
    plain = stride, padding if isinstance(padding, str) else per_axis(padding, axes), dilation
    if not is_transposed(node):
        return plain
    return *plain, per_axis(argument(node, "output_padding"), axes)
