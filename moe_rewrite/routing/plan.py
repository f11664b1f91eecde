"""The plan that a router makes at the cut, once, for every deep site.

Shapes: B batch, S positions, n patches, l patches an expert takes, E experts that are on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..ir.gate_layout import Layout
from ..ir.patch_grid import shares
from ..kernels.plan.op import largest
from .dispatch import RowGates


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
    per_row: to how many of the base and the active experts a row goes at most; None: no bound but
    their number.
    logits: (*rows, [1 +] len(active)) fp32, of which a token gate's are the softmax; else None.
    """

    active: tuple[int, ...]
    weights: torch.Tensor
    base: torch.Tensor | None
    num_experts: int
    rows: tuple[int, ...]
    picks: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    grid: int = 0
    per_row: int | None = None
    logits: torch.Tensor | None = None

    @property
    def gates(self) -> torch.Tensor:
        """(*rows, 1 + E) fp32 gates, or (*rows, E) without base; an expert that is off has 0."""
        full = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts)
        if self.active:
            index = torch.tensor(self.active, device=full.device)
            full = full.index_copy(-1, index, self.weights)
        return full if self.base is None else torch.cat([self.base, full], dim=-1)

    def load_balance_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``E sum_e f_e p_e``: 1 where rows are spread evenly over the E outputs that are on.

        f_e: share of the rows' choices that e got; p_e: mean probability of e (Switch Transformer,
        arXiv 2101.03961, equation 4, for any number of choices). mask: (B, S), nonzero for rows that
        count, where rows are such. Raises InputError for a plan of patches.
        """
        logits, count = self._token_logits(), self._counted(mask)
        gates = self.weights if self.base is None else torch.cat([self.base, self.weights], -1)
        chosen = (gates != 0) * count
        shares = chosen.flatten(0, -2).sum(0) / chosen.sum()
        mean = (logits.softmax(-1) * count).flatten(0, -2).sum(0) / count.sum()
        return logits.shape[-1] * (shares * mean).sum()

    def z_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean square of the logits' log-sum-exp, which keeps them small (ST-MoE, arXiv 2202.08906,
        equation 5). mask, errors: as for `load_balance_loss`."""
        logits, count = self._token_logits(), self._counted(mask)
        return (logits.logsumexp(-1, keepdim=True).square() * count).sum() / count.sum()

    def _token_logits(self) -> torch.Tensor:
        if self.logits is None:
            raise InputError("this plan holds no logits: losses are of a TokenRouter's plans")
        return self.logits

    def _counted(self, mask: torch.Tensor | None) -> torch.Tensor:
        """(*rows, 1) fp32, 1 for rows that count."""
        ones = self.weights.new_ones(*self.weights.shape[:-1], 1)
        if mask is None or mask.shape != ones.shape[:-1]:
            return ones
        return (mask != 0).to(ones).unsqueeze(-1)

    @property
    def selected(self) -> torch.Tensor:
        """(*rows,) index into `gates` of the largest gate; -1 for a patch that no expert took."""
        gates = self.gates
        index = largest(gates, 1)
        return index.masked_fill(gates.gather(-1, index) == 0, -1).squeeze(-1)


def align(plan: RoutingPlan, layout: Layout) -> torch.Tensor | RoutingPlan | RowGates | None:
    """The plan as a site takes it: for stacked LoRA rows, each gate times alpha / rank and repeated
    over the rank, laid out as the site's rows.

    Returns (..., active * rank), or (B, active * rank, H, W) for a convolution's map; sorted, the
    RowGates, or None where no expert is on.
    """
    if layout.kind == "plan":
        return plan
    if layout.kind == "head":
        return _for_classes(plan)
    if layout.sorted:
        return _row_gates(plan, layout)
    scales = (plan.weights * layout.scale).repeat_interleave(layout.rank, dim=-1).to(layout.dtype)
    return _laid_out(plan, scales, layout)


def _row_gates(plan: RoutingPlan, layout: Layout) -> RowGates | None:
    if not plan.active:
        return None
    base = plan.base if layout.sorted == "all" else None
    gates = plan.weights if base is None else torch.cat([base, plan.weights], dim=-1)
    return RowGates(_laid_out(plan, gates, layout), plan.per_row, base is not None)


def _laid_out(plan: RoutingPlan, scales: torch.Tensor, layout: Layout) -> torch.Tensor:
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


@dataclass
class PrefixState:
    """Running sum (B, D) and count (B,) of a prefix router, fp32, over the unmasked positions."""

    total: torch.Tensor
    count: torch.Tensor


Planner = Callable[
    [torch.Tensor, torch.Tensor | None], tuple[RoutingPlan, PrefixState | None]
]  # features at the cut and their mask -> the plan, and the router's state after these rows
