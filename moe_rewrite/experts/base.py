"""What every kind of expert has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ir.sites import AnySite

SEPARATOR = "/"  # a module's name may hold no dot, so state-dict names are kept with this


class ExpertSite(nn.Module):
    """What every kind of expert has. site: where they work. parts: names of an expert's tensors; a graph takes each part
    of all active experts together."""

    site: AnySite
    parts: tuple[str, ...]
    replaced: tuple[str, ...] = ()  # state-dict names of the weights whose work experts take over

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        """Add an expert; dense: the site's frozen tensors by state-dict name. Returns its
        parameters."""
        raise NotImplementedError

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Which experts are trained; the others are frozen and hold no gradient."""
        for of_part in self.parameter_lists():
            for p, on in zip(of_part, trained, strict=True):
                p.requires_grad_(on)
                if not on:
                    p.grad = None

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        """For each part that holds parameters, one of every expert."""
        raise NotImplementedError

    def remove_last(self) -> None:
        raise NotImplementedError

    def stacked(self, active: Sequence[int]) -> tuple[Any, ...]:
        """What the graph takes for each part, of the active experts."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what is kept from call to call."""
