"""The plan that a router makes at the cut, once, for every deep site.

Shapes: B batch, S positions, n patches, l patches an expert takes, E experts that are on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..grid import shares


@dataclass(frozen=True)
class Layout:
    """How the plan's rows lie in a site's input of `ndim` dimensions, for experts of a rank.

    kind: ``"rows"`` (B, S, ...), ``"sample"`` (B, ...), ``"swapped"`` (S, B, ...), ``"flat"``
    (B*S, D), ``"swapped_flat"`` (S*B, D), ``"map"`` (B, ..., H, W), ``"map_last"`` (B, H, W, ...);
    ``"plan"``: the plan itself, for a region; ``"head"``: (B, 1 + E) for a head's classes. scale: LoRA's alpha / rank. size: (H, W) of a map
    that a patch plan is laid over.
    """

    kind: Literal[
        "rows", "sample", "swapped", "flat", "swapped_flat", "map", "map_last", "plan", "head"
    ]
    ndim: int
    dtype: torch.dtype
    rank: int = 1
    scale: float = 1.0
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class RoutingPlan:
    """What goes where: made once at the cut, read by every deep site.

    active: indices of the experts that are on, in order.
    weights: (*rows, len(active)) fp32 gates of those experts. Of patches, rows are (B, n) in
    row-major order of the grid (behind a ViT's prefix tokens).
    base: (*rows, 1) fp32 gate of the frozen model, or None for a router without base.
    num_experts: all experts, also those that are off. rows: (B, S) or (B,) of the features.
    picks: (B, E, l) int64, patches that each expert takes, best first; kept: (B, E, l) fp32, their
    gates. None where tokens choose experts. With picks but no active expert, the frozen region
    takes them. grid: patches along each side.
    """

    active: tuple[int, ...]
    weights: torch.Tensor
    base: torch.Tensor | None
    num_experts: int
    rows: tuple[int, ...]
    picks: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    grid: int = 0

    @property
    def gates(self) -> torch.Tensor:
        """(*rows, 1 + E) fp32 gates, or (*rows, E) without base; an expert that is off has 0."""
        full = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts)
        if self.active:
            index = torch.tensor(self.active, device=full.device)
            full = full.index_copy(-1, index, self.weights)
        return full if self.base is None else torch.cat([self.base, full], dim=-1)

    @property
    def selected(self) -> torch.Tensor:
        """(*rows,) index into `gates` of the largest gate; -1 for a patch that no expert took."""
        largest, index = self.gates.max(dim=-1)
        return index.masked_fill(largest == 0, -1)


def align(plan: RoutingPlan, layout: Layout) -> torch.Tensor | RoutingPlan | None:
    """The plan as a site takes it: for stacked LoRA rows, each gate times alpha / rank and repeated
    over the rank, laid out as the site's rows.

    Returns (..., active * rank), or (B, active * rank, H, W) for a convolution's map.
    """
    if layout.kind == "plan":
        return plan
    if layout.kind == "head":
        return _for_classes(plan)
    scales = (plan.weights * layout.scale).repeat_interleave(layout.rank, dim=-1).to(layout.dtype)
    if layout.kind in ("map", "map_last"):
        return _over_map(plan, scales, layout)
    if layout.kind in ("swapped", "flat", "swapped_flat") and scales.ndim == 3:
        batch, length = plan.rows
        scales = scales.expand(batch, length, -1)
        if layout.kind.startswith("swapped"):
            scales = scales.transpose(0, 1)
        if layout.kind.endswith("flat"):
            return scales.reshape(batch * length, -1)
    if layout.kind == "sample" and scales.ndim == 3:
        scales = scales.squeeze(1)
    while scales.ndim < layout.ndim:
        scales = scales.unsqueeze(-2)
    return scales


def _over_map(plan: RoutingPlan, scales: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Gates of patches over a map of another resolution; gates of samples over any map."""
    if layout.size is None:
        scales = scales.reshape(scales.shape[0], 1, 1, -1)
    else:
        g = plan.grid
        rows, cols = (shares(n, g).to(scales) for n in layout.size)
        cells = scales[:, scales.shape[1] - g * g :].unflatten(1, (g, g))
        scales = torch.einsum("yi,xj,bije->byxe", rows, cols, cells)
    return scales if layout.kind == "map_last" else scales.permute(0, 3, 1, 2)


def _for_classes(plan: RoutingPlan) -> torch.Tensor | None:
    """(B, 1 + E) log of each gate of a sample: the frozen model's, then the experts'.

    None where patches choose, or without a gate of the frozen model: then classes are not weighed.
    """
    if plan.base is None or plan.picks is not None:
        return None
    gates = torch.cat([plan.base, plan.weights], dim=-1)
    if gates.ndim == 3:
        gates = gates.mean(1)
    return gates.clamp_min(torch.finfo(gates.dtype).tiny).log()
