"""Launches of the patch kernels. B, C, E, L, P, n, Q as in kernel.py."""

from __future__ import annotations

import torch

from ..triton import ceil_div, power_of_two
from . import kernel


def _blocks(channels: int, places: int) -> tuple[int, int]:
    """(channels, positions) of a program: 1024 elements, positions first."""
    wide = min(power_of_two(places), 256)
    return min(power_of_two(channels), max(1, 1024 // wide)), wide


def gather(
    x_BCQ: torch.Tensor,
    picks_BEL: torch.Tensor,
    positions_nP: torch.Tensor,
    gates_BEL: torch.Tensor | None = None,
) -> torch.Tensor:
    """(E, B * L, C, P): each expert's patches, times the gates if they are given."""
    x, picks, positions = x_BCQ.contiguous(), picks_BEL.contiguous(), positions_nP.contiguous()
    (B, C, Q), (E, L), P = x.shape, picks.shape[1:], positions.shape[1]
    out = x.new_empty(E, B * L, C, P)
    if out.numel():
        c, p = _blocks(C, P)
        kernel.gather_kernel[(E * B * L, ceil_div(C, c), ceil_div(P, p))](
            x, picks, positions, picks if gates_BEL is None else gates_BEL.contiguous(), out,
            B, C, E, L, P, Q, GATED=gates_BEL is not None, CHANNELS=c, PLACES=p,
        )  # fmt: skip
    return out


def scatter(
    patches: torch.Tensor,
    gates_BEL: torch.Tensor | None,
    picks_BEL: torch.Tensor,
    positions_nP: torch.Tensor,
    places: int,
) -> torch.Tensor:
    """(B, C, Q = places): the patches (E, B * L, C, P) added up at their positions."""
    (B, E, L), C, P = picks_BEL.shape, patches.shape[2], positions_nP.shape[1]
    out = patches.new_empty(B, C, places)
    if not out.numel() or not patches.numel():
        return out.zero_()
    at, order = positions_nP[picks_BEL.reshape(B, -1)].view(B, -1).sort(dim=1, stable=True)
    marks = torch.arange(places + 1, device=at.device).expand(B, -1).contiguous()
    ends = torch.searchsorted(at, marks)
    c, q = _blocks(C, places)
    kernel.scatter_kernel[(B, ceil_div(C, c), ceil_div(places, q))](
        patches.contiguous(), picks_BEL if gates_BEL is None else gates_BEL.contiguous(), order,
        ends, out, B, C, E, L, P, places, GATED=gates_BEL is not None, CHANNELS=c, PLACES=q,
    )  # fmt: skip
    return out


def gates_gradient(
    grad_BCQ: torch.Tensor,
    patches: torch.Tensor,
    picks_BEL: torch.Tensor,
    positions_nP: torch.Tensor,
) -> torch.Tensor:
    """(B, E, L) fp32."""
    grad, (B, E, L) = grad_BCQ.contiguous(), picks_BEL.shape
    out = grad.new_zeros(B, E, L, dtype=torch.float32)
    C, P = patches.shape[2:]
    if patches.numel():
        c, p = _blocks(C, P)
        kernel.gates_kernel[(E * B * L,)](
            grad, patches.contiguous(), picks_BEL.contiguous(), positions_nP.contiguous(), out,
            B, C, E, L, P, grad.shape[2], CHANNELS=c, PLACES=p,
        )  # fmt: skip
    return out
