"""The shared expert of a region whose experts are routed: a copy that every row has beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ...ir.sites import FeedForwardSite
from ..copies import CopiedParameters

Kind = Literal["plain", "sigmoid"]
HALF = 0.5  # of the dense output at the start, with the other half from the routed experts


class SharedExpert(CopiedParameters):
    """One copy of all of a region. parts: its tensors, then its gate if it has one.

    gate: (D,); what the copy gives a row is multiplied by the sigmoid of its product with the row,
        which is a half at the start. Without one ("plain") the last product begins halved.
    """

    def __init__(self, site: FeedForwardSite, kind: Kind) -> None:
        super().__init__(replace(site, parts=tuple(replace(p, kept=()) for p in site.parts)))
        self.kind = kind
        self.parts = tuple(site.shared(p) for p in self.parts)
        self.gate: nn.Parameter | None = None
        if kind == "sigmoid":
            self.parts = (*self.parts, site.shared_gate)

    @torch.no_grad()
    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        assert isinstance(self.site, FeedForwardSite)
        new = super().add(dense)
        if self.kind == "sigmoid":
            like = dense[self.site.weights[0]]
            self.computes[self.parts[-1]] = like.dtype
            zero = like.new_zeros(self.site.features, dtype=self.dtype_for(like.dtype))
            self.gate = nn.Parameter(zero)
            return [*new, self.gate]
        for part, copies in self._by_part():
            if part.name in self.site.down:
                copies[0].mul_(HALF)
        return new

    def tensors(self) -> list[Any]:
        """What a graph takes for each part."""
        copies = [of_part[0] for of_part in self.stacked((0,))]
        if self.gate is None:
            return copies
        return [*copies, self.in_graph(self.parts[-1], 0, self.gate)]

    def train_all(self, on: bool) -> None:
        """Set whether it is trained."""
        if self.quantized:
            return
        for p in self.parameters():
            p.requires_grad_(on and p.numel() > 0)
            if not on:
                p.grad = None
