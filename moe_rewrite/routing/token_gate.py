"""Token choice: every row chooses its experts by a softmax.

Shapes: B batch, S positions, D width of the features, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config import TokenRouter
from ..errors import InputError
from ..ir.program import lead_of
from ..kernels.plan.op import largest, route
from .packed_rows import PackedRows, RowMask
from .plan import PrefixState, RoutingPlan
from .router import GivenRows, Router


def reads_other_rows(spec: TokenRouter) -> bool:
    """Whether a row's gates depend on other rows of its sample."""
    return spec.granularity != "token" or spec.policy == "expert"


class TokenGate(Router):
    """The gate of a TokenRouter. Output 0 is the frozen model, with logit 0, if `base`.

    rows[e]: (D + 1,) fp32, weights and a bias.
    """

    by_row = biased = True

    @property
    def mixes_rows(self) -> bool:  # type: ignore[override]
        return reads_other_rows(self.spec)

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        return self.spec.granularity == "prefix"

    def __init__(self, spec: TokenRouter, width: int, device: torch.device) -> None:
        super().__init__(spec, width + 1, device)

    def new_row(self) -> torch.Tensor:
        row = super().new_row()
        if row.is_meta or not self.spec.init:
            return row
        row[:-1].normal_(0.0, self.spec.init / (self.size - 1) ** 0.5)
        return row

    def needs_one(self) -> bool:
        return not self.spec.base

    def without_experts(self, features: torch.Tensor) -> RoutingPlan:
        lead = lead_of(features.shape)
        sequence = self.spec.granularity == "sequence" and len(lead) > 1
        rows = (lead[0], 1) if sequence else lead
        return RoutingPlan((), features.new_zeros(*rows, 0, dtype=torch.float32), None, 0, lead)

    def fixed_gates(self, features: torch.Tensor, gates: dict[int, float]) -> RoutingPlan:
        """The plan that gives every row to these experts with these gates, and what is left of 1 to
        the frozen model."""
        rows = self.without_experts(features).weights.shape[:-1]
        active = tuple(sorted(gates))
        given = features.new_tensor([gates[e] for e in active], dtype=torch.float32)
        weights = given.expand(*rows, len(active)).contiguous()
        base = (1 - weights.sum(-1, keepdim=True)).clamp_min(0) if self.spec.base else None
        lead = lead_of(features.shape)
        return RoutingPlan(active, weights, base, len(self), lead, top_k=len(active))

    def forward(
        self,
        features: torch.Tensor,
        mask: RowMask,
        state: PrefixState | None,
        given: GivenRows | None = None,
    ) -> tuple[RoutingPlan, PrefixState | None]:
        """The plan for features (B, S, D), (B, D) or a feature map (B, D, H, W) or volume.

        mask: (B, S), nonzero for positions that count; PackedRows; or None.
        state: of a prefix router, before these positions; the state after them is returned.
        """
        with torch.no_grad():
            lead = lead_of(features.shape)
            read, state, seen = self._read(features, mask, state)
        active, rows = self._chosen(given)
        logits = self._logits(read, rows)
        if seen is not None:
            logits = self._with_prior(logits, seen)
        spare = self.spec.top_k or 0 if given is not None and given.open else 0
        gates, top_k = self._gates(logits, mask, spare)
        base = None
        if self.spec.base:
            base, gates = gates[..., :1], gates[..., 1:]
        plan = RoutingPlan(active, gates, base, len(self), lead, top_k=top_k, logits=logits)
        return plan, state

    def _gates(
        self, logits: torch.Tensor, mask: RowMask, spare: int
    ) -> tuple[torch.Tensor, int | None]:
        """(gates of every row, zero for experts that it does not go to; top_k).

        spare: columns of minus infinity to take the top k over, so that k columns exist for any
        number of experts.
        """
        if self.spec.policy == "expert":
            return _expert_choice(logits, mask, self.spec.capacity), None
        count = logits.shape[-1]
        if spare:
            none = logits.new_full((*logits.shape[:-1], spare), float("-inf"))
            logits = torch.cat([logits, none], dim=-1)
        k = min(self.spec.top_k or logits.shape[-1], logits.shape[-1])
        gates = _gate(logits, k, self.spec.gate == "all")
        return gates[..., :count] if spare else gates, k

    def _read(
        self, features: torch.Tensor, mask: RowMask, state: PrefixState | None
    ) -> tuple[torch.Tensor, PrefixState | None, torch.Tensor | None]:
        """(features that the gate reads, state after them, positions in each mean).

        Features are fp32 (B, S, D); (B, 1, D) for a sequence gate; or (B, D). The positions are
        (B, S, 1) for a prefix gate, else None.
        """
        x = features.detach().float()  # float() alone may return the features themselves
        if x.ndim > 3:
            x = _pooled(x, self.spec.pool)
        if self.spec.normalize:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = self._lifted(x)
        mask = None if state is not None and state.starts is not None else mask
        if x.ndim == 2 or self.spec.granularity == "token":
            return x, None, None
        counted = x.new_ones(x.shape[:2]) if mask is None else counted_rows(mask, x).float()
        if mask is not None:
            # it may hold infinities, which a multiplication by zero would make NaN
            x = x.masked_fill(counted.unsqueeze(-1) == 0, 0.0)
        if self.spec.granularity == "sequence":
            if isinstance(mask, PackedRows):
                mask.require_one_document(len(x), "a sequence gate")
            total = counted.sum(1, keepdim=True).clamp_min(1)
            return x.sum(1, keepdim=True) / total.unsqueeze(-1), None, None
        if x.shape[1] == 0:
            before = state or PrefixState(x.sum(1), counted.sum(1))
            return x, before, counted.unsqueeze(-1)
        if state is not None and state.starts is not None:
            return _means_in_documents(x, counted, state.starts, state)
        if isinstance(mask, PackedRows):
            return _means_in_documents(x, counted, mask.starts(len(x)))
        # of one position that follows others, its own features are the sum
        alone = state is not None and x.shape[1] == 1
        sums, counts = (x, counted) if alone else (x.cumsum(1), counted.cumsum(1))
        if state is not None:
            sums, counts = sums + state.total.unsqueeze(1), counts + state.count.unsqueeze(1)
        after = PrefixState(sums[:, -1], counts[:, -1], sums, counts)
        counts = counts.clamp_min(1).unsqueeze(-1)
        return sums / counts, after, counts

    @torch.no_grad()
    def sampled(self, features: torch.Tensor, mask: RowMask, count: int) -> torch.Tensor:
        """(B, P, F) fp32: what the gate reads at P = `count` positions of each sample, evenly spaced
        among those that count, the last one included; P = 1 where it reads one value a sample. F is
        D, or the number of random features."""
        read, _, _ = self._read(features, mask, None)
        if read.ndim == 2:
            return read.unsqueeze(1)
        if read.shape[1] != features.shape[1] or read.shape[1] == 1:
            return read
        counted = read.new_ones(read.shape[:2]) if mask is None else counted_rows(mask, read)
        numbers = counted.long().cumsum(1)  # of the positions, from 1 on
        steps = torch.arange(1, count + 1, device=read.device)
        wanted = (numbers[:, -1:] * steps / count).ceil().long()
        at = torch.searchsorted(numbers, wanted).clamp_max(read.shape[1] - 1)
        return read.gather(1, at.unsqueeze(-1).expand(-1, -1, read.shape[-1]))

    def _lifted(self, x: torch.Tensor) -> torch.Tensor:
        """Features of each position, before positions are averaged."""
        return x

    def _with_prior(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits for a mean of `seen` positions."""
        return logits

    def _logits(self, read: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        base = read.new_zeros(*read.shape[:-1], 1) if self.spec.base else None
        if rows is None:
            return base if base is not None else read.new_zeros(*read.shape[:-1], 0)
        if read.shape[-1] != rows.shape[1] - 1:
            raise InputError(
                f"the router reads {rows.shape[1] - 1} features, and the cut carries "
                f"{read.shape[-1]} in this call: split the model at another place"
            )
        # contiguous: with other strides, its sums depend on whether the rows require a gradient
        logits = nn.functional.linear(read.contiguous(), rows[:, :-1], rows[:, -1])
        return logits if base is None else torch.cat([base, logits], dim=-1)


def _pooled(x: torch.Tensor, cells: int) -> torch.Tensor:
    """(B, C * cells ** axes): means of the cells of a map, or of a volume (first over rows and
    columns, then over depth: ONNX has no such pooling over three axes)."""
    pool = nn.functional.adaptive_avg_pool2d
    if x.ndim == 5:
        x = pool(x.flatten(1, 2), cells).reshape(*x.shape[:3], cells**2)
        return pool(x, (cells, cells**2)).flatten(1)
    return pool(x, cells).flatten(1)


def _gate(logits: torch.Tensor, top_k: int, over_all: bool) -> torch.Tensor:
    """fp32 softmax, over the top k or over all outputs, with zero for all but the top k."""
    if top_k == logits.shape[-1]:
        return logits.softmax(-1)
    gates, experts = route(logits, top_k, normalize=not over_all)
    return gates.new_zeros(logits.shape).scatter(-1, experts, gates)


def _expert_choice(logits: torch.Tensor, mask: RowMask, capacity: float) -> torch.Tensor:
    """(B, S, E): the softmax over experts, zero where the row is not among an expert's best.

    Expert choice (arXiv 2202.09368, section 3.2) within each sample; masked rows are not chosen.
    """
    gates = logits.softmax(-1)
    length, experts = gates.shape[1:]
    taken = min(length, max(1, round(capacity * length / experts)))
    scores = gates.detach()
    if isinstance(mask, PackedRows):
        mask.require_one_document(len(scores), "expert choice")
    if mask is not None:
        scores = scores.masked_fill(~counted_rows(mask, scores).unsqueeze(-1), -1.0)
    picks = largest(scores.transpose(1, 2), taken).transpose(1, 2)
    chosen = torch.zeros_like(gates).scatter(1, picks, 1.0)
    return gates * chosen * (scores >= 0)


def _means_in_documents(
    x: torch.Tensor, counted: torch.Tensor, starts: torch.Tensor, before: PrefixState | None = None
) -> tuple[torch.Tensor, PrefixState, torch.Tensor]:
    """As `TokenGate._read`: means over each row's document up to the row. Sums are in float64, since
    those of earlier documents are taken off again. before: of each row's document, see
    `PrefixState.starts`."""
    wide = torch.cat([x, counted.unsqueeze(-1)], -1).double()
    sums = nn.functional.pad(wide.cumsum(1), (0, 0, 1, 0))
    at = starts.unsqueeze(-1).expand(-1, -1, sums.shape[-1])
    own = (sums[:, 1:] - sums.gather(1, at)).float()
    totals, counts = own[..., :-1], own[..., -1:]
    if before is not None:
        totals, counts = totals + before.total, counts + before.count.unsqueeze(-1)
    after = PrefixState(totals[:, -1], counts[:, -1, 0], totals, counts[..., 0])
    counts = counts.clamp_min(1)
    return totals / counts, after, counts


def counted_rows(mask: torch.Tensor | PackedRows, x: torch.Tensor) -> torch.Tensor:
    """(B, S) bool. Of a (B, past + S) mask, the columns that belong to these S positions."""
    if isinstance(mask, PackedRows):
        return mask.counted(len(x))
    if mask.ndim != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: a router that averages positions "
            f"needs (batch, length) for features {tuple(x.shape)}; use granularity='token' with "
            "other masks"
        )
    return mask[:, mask.shape[1] - x.shape[1] :] != 0
