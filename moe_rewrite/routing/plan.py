"""The plan that a router makes at the cut, once, for every deep site.

Shapes: B batch, S positions, n patches, l patches that an expert takes, E active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from ..kernels.plan.op import largest
from .packed_rows import RowMask

FEW = 8  # of so many experts that are on, rows have to go to one for the others to be left out


@dataclass(frozen=True)
class RoutingPlan:
    """Which rows go to which experts: made once at the cut, read by every deep site.

    active: indices of the active experts, in order.
    weights: (*rows, E) fp32 gates of the active experts. For patches, rows are (B, n) in row-major
        order of the grid (after a ViT's prefix tokens).
    base: (*rows, 1) fp32 gate of the frozen model; None for a router without base.
    num_experts: number of all experts, inactive ones included.
    rows: row dimensions of the features: (B, S), or (B,).
    patch_ids: (B, E, l) int64, the patches that each expert takes, best first; None where tokens
        choose experts. With no active expert, the frozen region takes them.
    patch_gates: (B, E, l) fp32 gates of `patch_ids`.
    grid: patches along each side; 0 without patches.
    top_k: most experts, the frozen model included, that a row goes to; None: no bound.
    logits: (*rows, [1 +] E) fp32 logits of a token gate, the frozen model's first; else None.
    score: ``"softmax"`` or ``"sigmoid"``, what makes probabilities of the logits.
    shared: outputs, the first ones, that every row has; they are not in the losses.
    """

    active: tuple[int, ...]
    weights: torch.Tensor
    base: torch.Tensor | None
    num_experts: int
    rows: tuple[int, ...]
    patch_ids: torch.Tensor | None = None
    patch_gates: torch.Tensor | None = None
    grid: int = 0
    top_k: int | None = None
    logits: torch.Tensor | None = None
    score: str = "softmax"
    shared: int = 0

    @property
    def gates(self) -> torch.Tensor:
        """(*rows, 1 + num_experts) fp32 gates, the frozen model's first, or (*rows, num_experts)
        without base; an inactive expert has 0."""
        full = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts)
        if self.active:
            index = torch.tensor(self.active, device=full.device)
            full = full.index_copy(-1, index, self.weights)
        return full if self.base is None else torch.cat([self.base, full], dim=-1)

    def of_taken(self, off_device: bool = False, trained: Sequence[int] = ()) -> RoutingPlan:
        """The same plan over the experts that some row goes to, if these are few of those that are on:
        what the others add is zero. For inference on the CPU: gradients want every expert, and other
        devices would be waited for.

        off_device: experts' weights lie off the device: leave out every one that no row goes to, but
            for those that are trained.
        """
        few = self.patch_ids is None and len(self.active) > 1
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if not few or traced or not (off_device or self._is_cheap()):
            return self
        wanted = self.weights.flatten(0, -2).any(0)
        if torch.is_grad_enabled():
            wanted = wanted | wanted.new_tensor([e in trained for e in self.active])
        taken = wanted.nonzero().flatten()
        if len(taken) == len(self.active):
            return self
        if not off_device and len(taken) > 1 and FEW * len(taken) > len(self.active):
            return self
        if not len(taken):  # one stays: without any, the frozen model would count whole
            taken = taken.new_zeros(1)
        active = tuple(self.active[e] for e in taken.tolist())
        weights = self.weights.index_select(-1, taken)
        return replace(self, active=active, weights=weights, logits=None)

    def _is_cheap(self) -> bool:
        """Whether looking for the experts that are taken costs less than running the others."""
        grad = torch.is_grad_enabled()
        return self.top_k is not None and not grad and self.weights.device.type == "cpu"

    def load_balance_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``E sum_e f_e p_e`` over the E active outputs that rows choose among: 1 where rows are spread
        evenly over them.

        f_e is the share of the rows' choices that went to e, p_e its mean probability (Switch
        Transformer, arXiv 2101.03961, equation 4, here for any number of choices; sigmoid scores
        are divided by their sum, as in DeepSeek-V3, arXiv 2412.19437, equation 19).

        mask: (B, S), nonzero for rows that count; used if rows are (B, S).

        Raises InputError for a plan of patches.
        """
        logits, count = self._token_logits(), self._counted(mask)
        gates = self.weights if self.base is None else torch.cat([self.base, self.weights], -1)
        chosen = (gates[..., self.shared :] != 0) * count
        shares = chosen.flatten(0, -2).sum(0) / chosen.sum()
        mean = (self._probabilities(logits) * count).flatten(0, -2).sum(0) / count.sum()
        return logits.shape[-1] * (shares * mean).sum()

    def z_loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean square of the logits' log-sum-exp, a penalty on large logits (ST-MoE, arXiv
        2202.08906, equation 5).

        mask: as for `load_balance_loss`, and so are errors.
        """
        logits, count = self._token_logits(), self._counted(mask)
        return (logits.logsumexp(-1, keepdim=True).square() * count).sum() / count.sum()

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        if self.score == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def _token_logits(self) -> torch.Tensor:
        if self.logits is None:
            raise InputError(
                "this plan holds no logits, whose losses train a TokenRouter(fit='gradient'): those "
                "of patches, of fixed gates, and of training with fit='analytic' have none"
            )
        routed = self.logits[..., self.shared :]
        if not routed.shape[-1]:
            raise InputError("only experts that every row has are on: there is nothing to choose")
        return routed

    def _counted(self, mask: torch.Tensor | None) -> torch.Tensor:
        """(*rows, 1) fp32, 1 for rows that count."""
        ones = self.weights.new_ones(*self.weights.shape[:-1], 1)
        if mask is None or mask.shape != ones.shape[:-1]:
            return ones
        return (mask != 0).to(ones).unsqueeze(-1)

    @property
    def selected(self) -> torch.Tensor:
        """(*rows,) int64 index into `gates` of the largest; -1 for a patch that no expert took."""
        gates = self.gates
        index = largest(gates, 1)
        return index.masked_fill(gates.gather(-1, index) == 0, -1).squeeze(-1)


@dataclass
class PrefixState:
    """State of a prefix router over the unmasked positions so far.

    total: (B, D) fp32 sum of the features.
    count: (B,) fp32 number of positions.
    totals, counts: (B, S, D) and (B, S), both after each of the latest call's positions, for who
        takes some of these back; None where nobody may.
    starts: (B, S) int64, the first row of each row's request, in samples that hold the rows of
        several; total and count are then (B, S, D) and (B, S), those before each row's request.
    """

    total: torch.Tensor
    count: torch.Tensor
    totals: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    starts: torch.Tensor | None = None


Planner = Callable[
    [torch.Tensor, RowMask], tuple[RoutingPlan, PrefixState | None]
]  # (features at the cut, their mask) -> (plan, the router's state after these rows)
