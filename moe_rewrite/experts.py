"""The experts' parameters: one module per site, one pair of matrices per expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .program import Site


class LoRASite(nn.Module):
    """LoRA experts of one linear site. a[e]: (rank, in), b[e]: (out, rank); b starts at zero."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.site, self.rank = site, rank
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        self._stack: tuple[object, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.a)

    def add(self, like: torch.Tensor) -> list[nn.Parameter]:
        """Add an expert with the dtype and device of `like`; returns its parameters."""
        a = like.new_empty(self.rank, self.site.in_features)
        if not a.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = like.new_zeros(self.site.out_features, self.rank)
        self.a.append(nn.Parameter(a))
        self.b.append(nn.Parameter(b))
        return [self.a[-1], self.b[-1]]

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Which experts are trained; the others are frozen and hold no gradient."""
        for a, b, on in zip(self.a, self.b, trained, strict=True):
            for p in (a, b):
                p.requires_grad_(on)
                if not on:
                    p.grad = None

    def remove_last(self) -> None:
        self.a, self.b = self.a[:-1], self.b[:-1]
        self._stack = None

    def stacked(self, active: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (active * rank, in) and B as (out, active * rank).

        Kept from call to call while no parameter changes, where no gradient is wanted.
        """
        if len(active) == 1:
            return self.a[active[0]], self.b[active[0]]
        if not active:
            like = self.a[0]
            return like[:0], like.new_zeros(self.site.out_features, 0)
        a, b = [self.a[e] for e in active], [self.b[e] for e in active]
        if torch.is_grad_enabled() and any(p.requires_grad for p in (*a, *b)):
            return torch.cat(a), torch.cat(b, dim=1)
        key = tuple((id(p), p._version, p.data_ptr()) for p in (*a, *b))
        if self._stack is None or self._stack[0] != key:
            with torch.no_grad():
                self._stack = key, (torch.cat(a), torch.cat(b, dim=1))
        return self._stack[1]
