"""The rule of a carved layer: gates are 1 for the experts that a row runs and 0 for the others.

Shapes: D width of a layer's rows, E active experts, the shared ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..kernels.plan.op import largest


@dataclass(frozen=True)
class CarveRule:
    """How logits (..., E) become gates, in float32.

    shared: the first experts, which every row runs.
    routed: of the others, those with the largest logits that a row runs.
    """

    shared: int
    routed: int

    score: ClassVar[str] = "softmax"  # the probabilities of a load-balancing loss

    def among(self, active: Sequence[int]) -> CarveRule:
        """The rule where these experts are on."""
        return replace(self, shared=sum(e < self.shared for e in active))

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(..., E) of rows x and the experts' rows of the router, (E, D), or with a bias (E, D + 1)."""
        wide, width = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        weight = weight.to(wide)
        bias = weight[:, width] if weight.shape[1] > width else None
        return F.linear(x.to(wide), weight[:, :width], bias)

    def gates(self, logits: torch.Tensor, spare: int = 0) -> tuple[torch.Tensor, int]:
        """(gates; experts of a row). The gradient of a gate that is 1 is taken as its logit's."""
        ones = torch.ones_like(logits)
        routed = logits[..., self.shared :]
        k = min(self.routed, routed.shape[-1])
        if k < routed.shape[-1]:
            chosen = torch.zeros_like(routed).scatter(-1, largest(routed, k), 1.0)
            ones = torch.cat([ones[..., : self.shared], chosen], -1)
        if logits.requires_grad:
            ones = ones + (logits - logits.detach()) * ones
        return ones, self.shared + k
