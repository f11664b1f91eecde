"""Statistics of a sample over the patches that an expert took of it: an approximation of those over
all positions, which they are where it took every patch.

N patches, those of a sample one after the other; C channels, h x w positions, P = h * w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...analysis.places import SpatialDims
from ...analysis.statistics import is_norm
from ...ir.aten import value
from ...ir.ops import argument, first, op, op_name


def normalized(
    x: torch.Tensor, own: torch.Tensor, taken: int, groups: int,
    weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
) -> torch.Tensor:  # fmt: skip
    """(N, C, h, w) normalized in groups of channels, in float32 for types that are less exact.

    own: (N, C, ., .), the positions that each patch has to itself; those of a sample's `taken`
        patches are averaged over.
    weight, bias: (C,).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    apart = own.to(exact).unflatten(0, (-1, taken)).unflatten(2, (groups, -1))
    mean = apart.mean((1, 3, 4, 5), keepdim=True)
    variance = (apart - mean).square().mean((1, 3, 4, 5), keepdim=True)
    low, scale = (
        _of_patches(t, x.shape[1] // groups, taken) for t in (mean, (variance + eps).rsqrt())
    )
    y = ((x.to(exact) - low) * scale).to(x.dtype)
    y = y if weight is None else y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def _of_patches(of_groups: torch.Tensor, size: int, taken: int) -> torch.Tensor:
    """(B, 1, G, 1, 1, 1) of samples and groups -> (B * taken, G * size, 1, 1)."""
    each = of_groups.expand(-1, taken, -1, size, -1, -1)
    return each.flatten(2, 3).flatten(0, 1)


def mean_of_samples(
    own: torch.Tensor, taken: int, dims: tuple[int, int], keepdim: bool
) -> torch.Tensor:
    """The mean of each channel over a sample's patches, for each of them again: (N, C, 1, 1), or
    without the dimensions `dims`, over which it is taken."""
    of_patch = own.mean(dims, keepdim=keepdim)
    of_sample = of_patch.unflatten(0, (-1, taken)).mean(1, keepdim=True)
    return of_sample.expand(-1, taken, *of_patch.shape[1:]).flatten(0, 1)


def at_patches(weight: torch.Tensor, positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, C or 1, h, w): the values of each patch of a weight (C, H, W) or (H, W) that varies by
    position. positions: (N, P)."""
    given = weight.reshape(-1, weight.shape[-2] * weight.shape[-1])
    return given[:, positions].transpose(0, 1).unflatten(2, like.shape[2:])


def by_position(node: fx.Node) -> list[fx.Node]:
    """The operands of a norm that vary by position."""
    if not op(node).normalized or not is_norm(node):
        return []
    given = (argument(node, name) for name in ("weight", "bias"))
    return [n for n in given if isinstance(n, fx.Node)]


def add_statistics(
    graph: fx.Graph, node: fx.Node, place: SpatialDims, given: tuple[fx.Node, fx.Node],
    taken: fx.Node, copies: dict[fx.Node, fx.Node], positions: fx.Node | None,
) -> fx.Node:  # fmt: skip
    """Add to a patch's code what a node that takes statistics becomes.

    place: of the map that it reads. given: this map where the node is needed, and where each patch
    has its own positions. taken: the number of a sample's patches. positions: of each patch, in the
    map, for weights that vary by position.
    """
    x, own = given

    def add(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    if not is_norm(node):
        pooled = op_name(node) == "adaptive_avg_pool2d"
        keepdim = pooled or bool(argument(node, "keepdim"))
        return add(mean_of_samples, own, taken, (place.rows, place.cols), keepdim)
    weights = [copies.get(n) for n in (argument(node, "weight"), argument(node, "bias"))]
    groups, eps = _groups(node), argument(node, "eps")
    if not by_position(node):
        return add(normalized, x, own, taken, groups, *weights, eps)
    y = add(normalized, x, own, taken, groups, None, None, eps)
    for weight, combine in zip(
        weights, (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor), strict=True
    ):
        if weight is not None:
            y = add(combine, y, add(at_patches, weight, positions, y))
    return y


def _groups(node: fx.Node) -> int:
    """The groups of channels that a norm has statistics of."""
    channels = int(value(first(node)).shape[1])
    if op_name(node) == "group_norm":
        return int(argument(node, "num_groups"))
    if op(node).normalized:
        return 1 if len(argument(node, op(node).normalized)) == 3 else channels
    return channels
