"""What every kind of expert has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

SEPARATOR = "/"  # a module's name may hold no dot, so state-dict names are kept with this


class ExpertParameters(nn.Module):
    """The experts of one site.

    site: where they work.
    parts: names of an expert's tensors; a graph takes each part of all active experts together.
    replaced: state-dict names of the weights whose work experts take over.
    as_adapter: an expert can be written as an adapter in PEFT's format.
    """

    site: Any
    parts: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    as_adapter = False

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

    def expert_dim(self, part: str) -> tuple[int, int] | None:
        """Where a stack of a part holds its experts: the dimension, and how many elements of it
        each has; None where it holds tensors apart."""
        return None

    def stacked_apart(self, active: Sequence[int]) -> tuple[torch.Tensor, ...] | None:
        """Of each part one tensor (E, ...) of all active experts, where all are of one shape and
        what runs at the site may take them so."""
        return None

    def named(
        self, part: str, stack: Any, active: Sequence[int]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """What `stacked` gave for a part with names instead of tensors, and the tensors by name."""
        if isinstance(stack, torch.Tensor):
            return part, {part: stack.detach()}
        names = [f"{part}.{expert}" for expert in active]
        return names, dict(zip(names, (t.detach() for t in stack), strict=True))

    def forget(self) -> None:
        """Drop what is kept from call to call."""
