"""The columns that experts add to a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..ir.sites import HeadSite
from .base import ExpertParameters


class HeadColumns(ExpertParameters):
    """The columns that experts added to a classification head.

    weight[e]: (classes, in); classes is 0 for an expert that added none.
    bias[e]: (classes,).
    """

    site: HeadSite
    parts = ("columns",)
    of_all = True

    def __init__(self, site: HeadSite) -> None:
        super().__init__()
        self.site = site
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        """Add an expert without columns, so without parameters; `widen` adds columns."""
        like = dense[self.site.weight]
        dtype = self.dtype_for(like.dtype)
        self.computes = {"weight": like.dtype, "bias": like.dtype}
        self.weight.append(nn.Parameter(like.new_empty(0, self.site.in_features, dtype=dtype)))
        self.bias.append(nn.Parameter(like.new_empty(0, dtype=dtype)))
        return []

    def widen(self, expert: int, classes: int) -> list[nn.Parameter]:
        """Give an expert columns, initialised like nn.Linear. Returns the new parameters."""
        bound = self.site.in_features**-0.5
        new = []
        for of_part, shape in (
            (self.weight, (classes, self.site.in_features)),
            (self.bias, (classes,)),
        ):
            fresh = of_part[expert].new_empty(shape)
            of_part[expert] = nn.Parameter(
                fresh if fresh.is_meta else fresh.uniform_(-bound, bound)
            )
            new.append(of_part[expert])
        return new

    @property
    def classes(self) -> list[int]:
        """How many columns each expert added."""
        return [len(bias) for bias in self.bias]

    def widen_all(self, classes: Sequence[int]) -> None:
        """Give every expert the number of columns that a save has."""
        for expert, count in enumerate(classes):
            if count:
                self.widen(expert, count)

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(self.weight), list(self.bias)]

    def remove(self, index: int) -> None:
        self.weight, self.bias = (
            nn.ParameterList(p for e, p in enumerate(of) if e != index)
            for of in (self.weight, self.bias)
        )
        self.forget()

    def remove_last(self) -> None:
        self.remove(len(self.weight) - 1)

    def merged(
        self, expert: int, dense: dict[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        if self.classes[expert]:
            raise ConfigError(
                f"{self.site.name}: this expert added {self.classes[expert]} columns to the head, "
                "which a merged model would not have"
            )
        return {}

    def join(self, experts: Sequence[int], weights: Sequence[float]) -> None:
        for expert in experts:
            if self.classes[expert]:
                raise ConfigError(
                    f"{self.site.name}: an expert that is to be joined added {self.classes[expert]} "
                    "columns to the head, whose place among the classes would change"
                )

    def named(
        self, part: str, stack: Any, active: Sequence[int]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        columns: list[Any] = []
        tensors: dict[str, torch.Tensor] = {}
        for column in stack:
            if isinstance(column, int):
                columns.append(column)
                continue
            *pair, place = column
            names = [f"{kind}.{active[place]}" for kind in ("weight", "bias")]
            tensors.update(zip(names, (t.detach() for t in pair), strict=True))
            columns.append((*names, place))
        return columns, tensors

    def stacked(self, active: Sequence[int]) -> tuple[list[tuple[Any, ...] | int], ...]:
        """One entry for each active expert with columns: (weight, bias, index in `active`); before it,
        the number of columns of inactive ones, if there are."""
        weights, biases = (list(of) for of in self.parameter_lists())
        place = {e: i for i, e in enumerate(active)}
        columns: list[tuple[Any, ...] | int] = []
        absent = 0
        for e, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if e not in place:
                absent += len(bias)
            elif len(bias):
                columns += [absent] if absent else []
                absent = 0
                pair = self.in_graph("weight", e, weight), self.in_graph("bias", e, bias)
                columns.append((*pair, place[e]))
        return (columns,)
