"""The parameters of experts: the interface of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

SEPARATOR = "/"  # replaces dots in state-dict names, which torch allows in no module name


class ExpertParameters(nn.Module):
    """The experts of one site.

    site: where they work.
    parts: names of an expert's tensors; a graph takes one input a part, for all active experts.
    replaced: state-dict names of the dense weights that experts replace.
    as_adapter: an expert can be written as an adapter in PEFT's format.
    """

    site: Any
    parts: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    as_adapter = False

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        """Add an expert and return its new parameters.

        dense: the site's frozen tensors by state-dict name.
        """
        raise NotImplementedError

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Set which experts are trained; the others are frozen, and their gradients dropped."""
        for of_part in self.parameter_lists():
            for p, on in zip(of_part, trained, strict=True):
                p.requires_grad_(on)
                if not on:
                    p.grad = None

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        """For each part that holds parameters, the list of the experts' parameters."""
        raise NotImplementedError

    def remove_last(self) -> None:
        raise NotImplementedError

    def stacked(self, active: Sequence[int]) -> tuple[Any, ...]:
        """The graph's input for each part, for these active experts."""
        raise NotImplementedError

    def expert_dim(self, part: str) -> tuple[int, int] | None:
        """(dimension along which a part's experts are stacked, elements of each expert along it);
        None if the part is a list of tensors."""
        return None

    def stacked_apart(self, active: Sequence[int]) -> tuple[torch.Tensor, ...] | None:
        """One tensor (E, ...) a part, if all experts have one shape and the site's call accepts
        stacks; else None."""
        return None

    def named(
        self, part: str, stack: Any, active: Sequence[int]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """A part's value from `stacked` with names instead of tensors, and the tensors by name."""
        if isinstance(stack, torch.Tensor):
            return part, {part: stack.detach()}
        names = [f"{part}.{expert}" for expert in active]
        return names, dict(zip(names, (t.detach() for t in stack), strict=True))

    def forget(self) -> None:
        """Drop cached stacks."""
