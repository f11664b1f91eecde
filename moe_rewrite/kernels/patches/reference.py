"""Gather patches, run experts, scatter what they give, in plain PyTorch.

B batch, C channels, E experts, l patches an expert takes of each sample, n patches of the grid,
h x w the positions gathered for a patch, P = h * w.
"""

from __future__ import annotations

import torch


def gather_patches(
    x_BCHW: torch.Tensor, picks_BEl: torch.Tensor, positions_nP: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """(E, B * l, C, h, w): each expert's patches, a batch an expert.

    positions_nP: int64, where each patch lies in the map flattened to H * W. size: (h, w).
    """
    B, C = x_BCHW.shape[:2]
    E, taken = picks_BEl.shape[1:]
    index = positions_nP[picks_BEl].reshape(B, 1, -1).expand(-1, C, -1)
    patches = x_BCHW.flatten(2).gather(2, index).view(B, C, E, taken, *size)
    return patches.permute(2, 0, 3, 1, 4, 5).reshape(E, B * taken, C, *size)


def scatter_patches(
    patches: list[torch.Tensor],
    gates_BEl: torch.Tensor,
    picks_BEl: torch.Tensor,
    positions_nP: torch.Tensor,
    size: tuple[int, int],
    apart: bool,
) -> torch.Tensor:
    """(B, C, H, W): the experts' patches, each (B * l, C, h, w), added up in their places times
    their gates; zero where no patch was taken. size: (H, W)."""
    B, E, taken = picks_BEl.shape
    C, h, w = patches[0].shape[1:]
    together = torch.stack(patches) if E > 1 else patches[0]  # a lone expert's need no copy
    y = together.reshape(E, B, taken, C, h * w)
    gates = gates_BEl.transpose(0, 1).to(y.dtype)[..., None, None]
    # nothing needs the experts' own outputs where no gradient of the gates is wanted
    y = y * gates if y.requires_grad or gates.requires_grad else y.mul_(gates)
    source = y.permute(1, 3, 0, 2, 4).reshape(B, C, -1)
    index = positions_nP[picks_BEl].reshape(B, 1, -1).expand(-1, C, -1)
    out = y.new_zeros(B, C, size[0] * size[1])
    if E == 1 and apart:  # cheaper than adding
        return out.scatter_(2, index, source).view(B, C, *size)
    return out.scatter_add_(2, index, source).view(B, C, *size)
