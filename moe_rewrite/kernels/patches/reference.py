"""Gather patches from a map and scatter them back, in plain PyTorch: the reference.

B batch, C channels, E experts, l patches an expert takes of each sample, n patches of the grid,
h x w the positions gathered for a patch, P = h * w.
"""

from __future__ import annotations

import torch


def gather_patches(
    x_BCHW: torch.Tensor, picks_BEl: torch.Tensor, positions_nP: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """(E, B * l, C, h, w): each expert's patches as one batch.

    positions_nP: int64 positions of each patch in the map flattened to H * W.
    size: (h, w).
    """
    B, C = x_BCHW.shape[:2]
    E, taken = picks_BEl.shape[1:]
    # expanded, so that the patches come out in their final order: no map is copied twice
    index = positions_nP[picks_BEl.flatten(1)].unsqueeze(2).expand(-1, -1, C, -1)
    flat = x_BCHW.flatten(2).unsqueeze(1).expand(-1, E * taken, -1, -1)
    patches = flat.gather(3, index).view(B, E, taken, C, *size)
    return patches.transpose(0, 1).reshape(E, B * taken, C, *size)


def scatter_patches(
    patches: list[torch.Tensor],
    gates_BEl: torch.Tensor,
    picks_BEl: torch.Tensor,
    positions_nP: torch.Tensor,
    size: tuple[int, int],
    apart: bool,
) -> torch.Tensor:
    """(B, C, H, W): the experts' patches, each (B * l, C, h, w), added up at their positions times
    their gates; zero where no patch was taken. size: (H, W)."""
    B, E, taken = picks_BEl.shape
    C, h, w = patches[0].shape[1:]
    together = torch.stack(patches) if E > 1 else patches[0]  # one expert: no copy
    y = together.reshape(E, B, taken, C, h * w).permute(1, 3, 0, 2, 4)  # (B, C, E, l, P)
    gates = gates_BEl.to(y.dtype)[:, None, ..., None]
    if y.requires_grad or gates.requires_grad or torch.compiler.is_compiling():
        source = (y * gates).reshape(B, C, E * taken * h * w)
    else:  # one pass into the order of the output
        source = torch.mul(y, gates, out=y.new_empty(y.shape)).view(B, C, E * taken * h * w)
    index = positions_nP[picks_BEl].reshape(B, 1, E * taken * h * w).expand(-1, C, -1)
    out = y.new_zeros(B, C, size[0] * size[1])
    if E == 1 and apart:  # cheaper than adding
        return out.scatter_(2, index, source).view(B, C, *size)
    return out.scatter_add_(2, index, source).view(B, C, *size)
