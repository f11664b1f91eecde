"""Fresh inputs of the patch ops' tests."""

import torch


def patch_inputs(B, C, E, L, size, n, patch, seed=0):
    """fp64 x, patches, gates; picks that meet; positions that overlap and repeat (a halo beyond the
    map reads its edge)."""
    torch.manual_seed(seed + B + C)
    (H, W), (h, w) = size, patch
    picks = torch.rand(B, E, n).argsort(-1)[..., :L]
    top, left = torch.randint(-1, H, (n, 1)), torch.randint(-1, W, (n, 1))
    rows = (top + torch.arange(h)).clamp(0, H - 1)
    cols = (left + torch.arange(w)).clamp(0, W - 1)
    positions = (rows[:, :, None] * W + cols[:, None]).view(n, -1)
    return {
        "x": torch.randn(B, C, H, W).double(), "picks": picks, "positions": positions,
        "patches": torch.randn(E, B * picks.shape[2], C, h, w).double(),
        "gates": torch.rand(B, E, picks.shape[2]).double(),
    }  # fmt: skip
