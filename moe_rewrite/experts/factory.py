"""The experts' parameters: one module per site.

A site's `parts` name what its experts have, in the order in which the graph takes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..ir.program import AnySite, FeedForwardSite, HeadSite, Part, RegionSite, Site

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


class LoRASite(ExpertSite):
    """LoRA experts of one linear map or convolution. a[e]: (rank, in, *kernel), b[e]: (out, rank)
    or (out, rank, 1, 1); b starts at zero."""

    site: Site
    parts = ("a", "b")

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.site, self.rank = site, rank
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        self._stack: tuple[object, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.a)

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        like = dense[self.site.weight]
        a = like.new_empty(self.rank, self.site.in_features, *self.site.kernel)
        if not a.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = self._no_b(like, self.rank)
        self.a.append(nn.Parameter(a))
        self.b.append(nn.Parameter(b))
        return [self.a[-1], self.b[-1]]

    def _no_b(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        return like.new_zeros(self.site.out_features, rank, *(1 for _ in self.site.kernel))

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(self.a), list(self.b)]

    def remove_last(self) -> None:
        self.a, self.b = self.a[:-1], self.b[:-1]
        self.forget()

    def forget(self) -> None:
        self._stack = None

    def stacked(self, active: Sequence[int]) -> tuple[Any, Any]:
        """A as (active * rank, in, ...) and B as (out, active * rank, ...); of a linear map that is
        trained, lists of parts: a stack of the older, frozen experts, and the others by themselves.

        Stacks are kept from call to call while no parameter changes.
        """
        if len(active) == 1:
            return self.a[active[0]], self.b[active[0]]
        if not active:
            like = self.a[0]
            return like[:0], self._no_b(like, 0)
        a, b = [self.a[e] for e in active], [self.b[e] for e in active]
        if torch.is_grad_enabled() and any(p.requires_grad for p in (*a, *b)):
            if self.site.kernel:
                return torch.cat(a), torch.cat(b, dim=1)
            frozen = next(i for i, p in enumerate(a) if p.requires_grad or b[i].requires_grad)
            if frozen < 2:
                return a, b
            older = self._kept(a[:frozen], b[:frozen])
            return [older[0], *a[frozen:]], [older[1], *b[frozen:]]
        return self._kept(a, b)

    def _kept(
        self, a: list[torch.Tensor], b: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = tuple((id(p), p._version, p.data_ptr()) for p in (*a, *b))
        if self._stack is None or self._stack[0] != key:
            with torch.no_grad():
                self._stack = key, (torch.cat(a), torch.cat(b, dim=1))
        return self._stack[1]


class RegionCopies(ExpertSite):
    """Experts that each have the weights and statistics of a region, all or a share of them."""

    site: RegionSite | FeedForwardSite

    def __init__(self, site: RegionSite | FeedForwardSite) -> None:
        super().__init__()
        self.site = site
        self.parts = self.replaced = tuple(p.name for p in site.parts)
        self.copies = nn.ModuleDict({p.name.replace(".", SEPARATOR): _Copies() for p in site.parts})

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        new = []
        for part, copies in self._by_part():
            tensor = _share(dense[part.name], part, len(copies))
            copies.put(tensor, part.kind == "weight")
            if part.kind == "weight":
                new.append(copies[-1])
        return new  # type: ignore[return-value]

    def _by_part(self) -> list[tuple[Part, _Copies]]:
        return list(zip(self.site.parts, self.copies.values(), strict=True))  # type: ignore[arg-type]

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(c.parameters()) for p, c in self._by_part() if p.kind == "weight"]

    def remove_last(self) -> None:
        for _, copies in self._by_part():
            copies.pop()

    def stacked(self, active: Sequence[int]) -> tuple[list[torch.Tensor], ...]:
        return tuple([copies[e] for e in active] for _, copies in self._by_part())


class _Copies(nn.Module):
    """One part of every expert, by number: parameters or buffers."""

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([*self._parameters.values(), *self._buffers.values()])  # type: ignore[list-item]

    def __getitem__(self, index: int) -> torch.Tensor:
        return list(self)[index]

    def put(self, tensor: torch.Tensor, parameter: bool) -> None:
        if parameter:
            self.register_parameter(str(len(self)), nn.Parameter(tensor))
        else:
            self.register_buffer(str(len(self)), tensor)

    def pop(self) -> None:
        delattr(self, str(len(self) - 1))


def _share(dense: torch.Tensor, part: Part, expert: int) -> torch.Tensor:
    """A copy of what an expert has of a dense tensor: of every shared dimension its own slice, as
    far as there are such, then from the front again."""
    share = dense.detach()
    for dim, kept in part.kept:
        full = dense.shape[dim]
        index = (expert * kept + torch.arange(kept, device=dense.device)) % full
        share = share.index_select(dim, index)
    return share.clone()


class HeadColumns(ExpertSite):
    """The columns that experts added to a classification head.

    weight[e]: (classes, in), bias[e]: (classes,); of no classes for an expert that added none.
    """

    site: HeadSite
    parts = ("columns",)

    def __init__(self, site: HeadSite) -> None:
        super().__init__()
        self.site = site
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        """Nothing to train yet: `widen` gives the expert its columns."""
        like = dense[self.site.weight]
        self.weight.append(nn.Parameter(like.new_empty(0, self.site.in_features)))
        self.bias.append(nn.Parameter(like.new_empty(0)))
        return []

    def widen(self, expert: int, classes: int) -> list[nn.Parameter]:
        """Give an expert columns, drawn as nn.Linear draws its own."""
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

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(self.weight), list(self.bias)]

    def remove_last(self) -> None:
        self.weight, self.bias = self.weight[:-1], self.bias[:-1]

    def stacked(self, active: Sequence[int]) -> tuple[list[tuple[Any, ...] | int], ...]:
        """(weight, bias, place in `active`) of each expert with columns up to the last one that is
        on; of those among them that are off, how many columns."""
        wide = [e for e in range(len(self.weight)) if len(self.bias[e])]
        last = max((e for e in wide if e in active), default=-1)
        columns: list[tuple[Any, ...] | int] = []
        for e in (e for e in wide if e <= last):
            if e in active:
                columns.append((self.weight[e], self.bias[e], list(active).index(e)))
            else:
                columns.append(len(self.bias[e]))
        return (columns,)


def make_site(site: AnySite, rank: int) -> ExpertSite:
    if isinstance(site, HeadSite):
        return HeadColumns(site)
    return LoRASite(site, rank) if isinstance(site, Site) else RegionCopies(site)
