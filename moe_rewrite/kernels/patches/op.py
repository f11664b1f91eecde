"""Gather patches from a map and scatter them back: `gather_patches`, `scatter_patches`.

Shapes as in reference.py. Where kernels run these are ops with deterministic gradients; elsewhere,
and in a trace for export, plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch

from ..triton import runs_on
from . import reference

__all__ = ["gather_patches", "scatter_patches"]


def gather_patches(
    x_BCHW: torch.Tensor, picks_BEl: torch.Tensor, positions_nP: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """(E, B * l, C, h, w): each expert's patches as one batch. Differentiable once in x.

    picks_BEl: int64 indices of patches, 0 .. n-1.
    positions_nP: int64 positions of each patch in the map flattened to H * W; may repeat.
    size: (h, w).
    """
    if not runs_on(x_BCHW) or torch.compiler.is_exporting():
        return reference.gather_patches(x_BCHW, picks_BEl, positions_nP, size)
    out = _gather(x_BCHW.flatten(2), picks_BEl, positions_nP)
    return out.view(*out.shape[:3], *size)


def scatter_patches(
    patches: list[torch.Tensor],
    gates_BEl: torch.Tensor,
    picks_BEl: torch.Tensor,
    positions_nP: torch.Tensor,
    size: tuple[int, int],
    apart: bool,
) -> torch.Tensor:
    """(B, C, H, W): the experts' patches, each (B * l, C, h, w), added up at their positions times
    their gates; zero where no patch was taken. Differentiable once in the patches and gates.

    size: (H, W).
    apart: whether no two patches of the grid overlap.
    """
    if not runs_on(patches[0]) or torch.compiler.is_exporting():
        return reference.scatter_patches(patches, gates_BEl, picks_BEl, positions_nP, size, apart)
    together = torch.stack(patches).flatten(3)
    out = _scatter(together, gates_BEl, picks_BEl, positions_nP, size[0] * size[1])
    return out.view(*out.shape[:2], *size)


@torch.library.custom_op("moe_rewrite::gather_patches", mutates_args=())
def _gather(x: torch.Tensor, picks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if runs_on(x):
        from . import launch

        return launch.gather(x, picks, positions)
    size = 1, positions.shape[1]
    return reference.gather_patches(x.unsqueeze(2), picks, positions, size).squeeze(3).clone()


@_gather.register_fake
def _(x: torch.Tensor, picks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    (B, E, L), P = picks.shape, positions.shape[1]
    return x.new_empty(E, B * L, x.shape[1], P)


@torch.library.custom_op("moe_rewrite::scatter_patches", mutates_args=())
def _scatter(
    patches: torch.Tensor,
    gates: torch.Tensor | None,
    picks: torch.Tensor,
    positions: torch.Tensor,
    places: int,
) -> torch.Tensor:
    """(B, C, places) of patches (E, B * L, C, P); gates=None means ones."""
    if runs_on(patches):
        from . import launch

        return launch.scatter(patches, gates, picks, positions, places)
    gates = torch.ones_like(picks, dtype=patches.dtype) if gates is None else gates
    apart, split = False, list(patches.unsqueeze(3))
    size = 1, places
    return reference.scatter_patches(split, gates, picks, positions, size, apart).squeeze(2).clone()


@_scatter.register_fake
def _(*given: Any) -> torch.Tensor:
    patches, _, picks, _, places = given
    return patches.new_empty(picks.shape[0], patches.shape[2], places)


@torch.library.custom_op("moe_rewrite::scatter_patches_backward", mutates_args=())
def _scatter_backward(
    grad: torch.Tensor,
    patches: torch.Tensor,
    gates: torch.Tensor,
    picks: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the patches, gradient of the gates)."""
    if runs_on(grad):
        from . import launch

        dgates = launch.gates_gradient(grad, patches, picks, positions)
        return launch.gather(grad, picks, positions, gates), dgates.to(gates.dtype)
    B, E, L = picks.shape
    seen = reference.gather_patches(grad.unsqueeze(2), picks, positions, (1, positions.shape[1]))
    seen = seen.view(E, B, L, *patches.shape[2:])
    own = gates.transpose(0, 1).to(grad.dtype)
    dgates = (seen * patches.view_as(seen)).sum((-1, -2)).transpose(0, 1).to(gates.dtype)
    return (seen * own[..., None, None]).view_as(patches), dgates.contiguous()


@_scatter_backward.register_fake
def _(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, patches, gates, *_ = given
    return patches.new_empty(patches.shape), gates.new_empty(gates.shape)


def _save_gather(ctx: Any, inputs: Any, output: Any) -> None:
    x, picks, positions = inputs
    ctx.places = x.shape[2]
    ctx.save_for_backward(picks, positions)


def _backward_gather(ctx: Any, grad: torch.Tensor) -> Any:
    picks, positions = ctx.saved_tensors
    dx = torch.ops.moe_rewrite.scatter_patches(grad, None, picks, positions, ctx.places)
    return dx, None, None


def _save_scatter(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_scatter(ctx: Any, grad: torch.Tensor) -> Any:
    back = torch.ops.moe_rewrite.scatter_patches_backward
    return *back(grad, *ctx.saved_tensors), None, None, None


_gather.register_autograd(_backward_gather, setup_context=_save_gather)
_scatter.register_autograd(_backward_scatter, setup_context=_save_scatter)
