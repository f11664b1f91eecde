"""The router at the cut and the plan it makes, once, for every deep site.

Shapes: B batch, S positions, D width of the features, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .analysis.rows import lead_of
from .config import TokenRouter
from .errors import ConfigError, InputError


@dataclass(frozen=True)
class Layout:
    """How the plan's rows lie in a site's input of `ndim` dimensions, for experts of a rank.

    kind: ``"rows"`` (B, S, ...), ``"sample"`` (B, ...), ``"swapped"`` (S, B, ...), ``"flat"``
    (B*S, D) or ``"swapped_flat"`` (S*B, D). scale: LoRA's alpha / rank.
    """

    kind: Literal["rows", "sample", "swapped", "flat", "swapped_flat"]
    ndim: int
    dtype: torch.dtype
    rank: int
    scale: float


@dataclass(frozen=True)
class RoutingPlan:
    """What goes where: made once at the cut, read by every deep site.

    active: indices of the experts that are on, in order.
    weights: (*rows, len(active)) fp32 gates of those experts.
    base: (*rows, 1) fp32 gate of the frozen model, or None for a router without base.
    num_experts: all experts, also those that are off. rows: (B, S) or (B,) of the features.
    """

    active: tuple[int, ...]
    weights: torch.Tensor
    base: torch.Tensor | None
    num_experts: int
    rows: tuple[int, ...]

    @staticmethod
    def without_experts(features: torch.Tensor, granularity: str) -> RoutingPlan:
        """The plan of the dense model: no expert is on."""
        lead = lead_of(features.shape)
        rows = (lead[0], 1) if granularity == "sequence" and len(lead) > 1 else lead
        return RoutingPlan((), features.new_zeros(*rows, 0, dtype=torch.float32), None, 0, lead)

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
        """(*rows,) index into `gates` of the largest gate."""
        return self.gates.argmax(dim=-1)


def align(plan: RoutingPlan, layout: Layout) -> torch.Tensor:
    """The plan's gates as the factors of stacked LoRA rows, laid out as a site's rows.

    Returns (..., active * rank), each gate times alpha / rank and repeated over the rank.
    """
    scales = (plan.weights * layout.scale).repeat_interleave(layout.rank, dim=-1).to(layout.dtype)
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


@dataclass
class PrefixState:
    """Running sum (B, D) and count (B,) of a prefix router, fp32, over the unmasked positions."""

    total: torch.Tensor
    count: torch.Tensor


class Router(nn.Module):
    """One linear row per expert on the features at the cut, a softmax over those that are on.

    rows[e]: (D + 1,) fp32, weights and a bias. Output 0 is the frozen model, with logit 0. Rows
    stay fp32 when the model is cast. Experts that are off take no part in the softmax at all, so
    adding one changes no bit of the others' gates.
    """

    active: torch.Tensor
    pending: torch.Tensor

    def __init__(self, spec: TokenRouter, width: int, device: torch.device) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.rows = nn.ParameterList()
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("pending", torch.zeros(0, dtype=torch.bool))
        # (e, D + 3): rows, active and pending flags as they were when expert e came
        self.before = nn.ParameterList()
        self.device = device

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, count: int, active: bool) -> list[nn.Parameter]:
        """Add `count` rows of zeros, each with a record of what the router was before it."""
        new = []
        for _ in range(count):
            flags = torch.stack([self.active, self.pending], 1).to(self.device, torch.float32)
            rows = [r.detach() for r in self.rows]
            older = (
                torch.stack(rows) if rows else torch.zeros(0, self.width + 1, device=self.device)
            )
            record = torch.cat([older, flags], 1)
            self.before.append(nn.Parameter(record, requires_grad=False))
            self.rows.append(nn.Parameter(torch.zeros(self.width + 1, device=self.device)))
            new.append(self.rows[-1])
            self.active = torch.cat([self.active, torch.tensor([active])])
            self.pending = torch.cat([self.pending, torch.tensor([not active])])
        return new

    def remove_last(self) -> None:
        """Take the last row off and set all else to what it was before it came."""
        record = self.before[-1]
        self.rows, self.before = self.rows[:-1], self.before[:-1]
        with torch.no_grad():
            for row, old in zip(self.rows, record[:, :-2], strict=True):
                row.copy_(old)
        if record.is_meta:  # which holds no values to go back to
            self.active, self.pending = self.active[:-1], self.pending[:-1]
            return
        flags = record[:, -2:].bool().cpu()
        self.active, self.pending = flags[:, 0].clone(), flags[:, 1].clone()

    def set_active(self, index: int, on: bool) -> None:
        if not on and not self.spec.base and self.active_indices() == (index,):
            raise ConfigError(
                f"expert {index} is the last one that is on and the router has no base: "
                "activate another first"
            )
        self.active[index], self.pending[index] = on, False

    def activate_pending(self) -> None:
        if bool(self.pending.any()):
            self.active |= self.pending
            self.pending.zero_()

    def active_indices(self) -> tuple[int, ...]:
        return tuple(self.active.nonzero().flatten().tolist())

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move with the model, keep the dtype; the flags stay on the CPU (they steer Python)."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        flags = self.active, self.pending
        super()._apply(keep_dtype, recurse)
        self.active, self.pending = flags
        if len(self.rows):
            self.device = self.rows[0].device
        return self

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        state: PrefixState | None,
    ) -> tuple[RoutingPlan, PrefixState | None]:
        """The plan for features (B, S, D), (B, D) or a feature map (B, D, H, W).

        mask: (B, S) with nonzero for positions that count, or None. state: what a prefix router
        has seen before these positions; the state after them comes back.
        """
        with torch.no_grad():
            lead = lead_of(features.shape)
            read, state = self._read(features, mask, state)
        active = self.active_indices()
        logits = self._logits(read, active)
        gates = _gate(logits, self.spec.top_k)
        base = None
        if self.spec.base:
            base, gates = gates[..., :1], gates[..., 1:]
        return RoutingPlan(active, gates, base, len(self), lead), state

    def _read(
        self, features: torch.Tensor, mask: torch.Tensor | None, state: PrefixState | None
    ) -> tuple[torch.Tensor, PrefixState | None]:
        """What the gate reads, fp32: (B, S, D), (B, 1, D) for a sequence gate, or (B, D)."""
        x = features.float()
        if x.ndim == 4:
            x = x.flatten(2).mean(-1)
        if self.spec.normalize:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if x.ndim == 2 or self.spec.granularity == "token":
            return x, None
        counted = x.new_ones(x.shape[:2]) if mask is None else _own_columns(mask, x).float()
        # a masked position may hold anything, infinities included: drop it, do not scale it
        x = x.masked_fill(counted.unsqueeze(-1) == 0, 0.0)
        if self.spec.granularity == "sequence":
            total = counted.sum(1, keepdim=True).clamp_min(1)
            return x.sum(1, keepdim=True) / total.unsqueeze(-1), None
        sums, counts = x.cumsum(1), counted.cumsum(1)
        if state is not None:
            sums, counts = sums + state.total.unsqueeze(1), counts + state.count.unsqueeze(1)
        after = PrefixState(sums[:, -1], counts[:, -1])
        return sums / counts.clamp_min(1).unsqueeze(-1), after

    def _logits(self, read: torch.Tensor, active: Sequence[int]) -> torch.Tensor:
        base = read.new_zeros(*read.shape[:-1], 1) if self.spec.base else None
        if not active:
            return base if base is not None else read.new_zeros(*read.shape[:-1], 0)
        rows = torch.stack([self.rows[e] for e in active])
        logits = nn.functional.linear(read, rows[:, :-1], rows[:, -1])
        return logits if base is None else torch.cat([base, logits], dim=-1)


def _gate(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """fp32 softmax, over all outputs or over the top k with zero for the others."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits.softmax(-1)
    values, indices = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values.softmax(-1))


def _own_columns(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The part of a (B, past + S) mask that belongs to these S positions."""
    if mask.ndim != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: a router that averages positions "
            f"needs (batch, length) for features {tuple(x.shape)}; use granularity='token' with "
            "other masks"
        )
    return mask[:, mask.shape[1] - x.shape[1] :] != 0
