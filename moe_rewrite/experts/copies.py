"""Experts that are copies of a region's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..ir.sites import FeedForwardSite, Part, RegionSite
from ..kernels.ffn.low_precision import LowPrecision
from ..utils.module_tree import Holder, put_module
from .base import ExpertParameters


class CopiedParameters(ExpertParameters):
    """Experts that are copies of a region's weights and buffers, whole or a share of each."""

    site: RegionSite | FeedForwardSite

    def __init__(self, site: RegionSite | FeedForwardSite, stackable: bool = False) -> None:
        """stackable: all experts' tensors have the same shape and may be passed as one stack."""
        super().__init__()
        self._stackable = stackable
        self.site = site
        self.offloads = isinstance(site, FeedForwardSite)  # statistics of regions are written to
        self.parts = self.replaced = tuple(p.name for p in site.parts)
        self.copies = Holder()
        self._of_part = tuple(_Copies() for _ in site.parts)  # in the order of the site's parts
        for part, copies in zip(site.parts, self._of_part, strict=True):
            put_module(self.copies, part.name, copies)

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        new = []
        for part, copies in self._by_part():
            own = dense[part.name]
            tensor = _share(own, part, len(copies))
            if part.kind == "weight":
                tensor = tensor.to(self.dtype_for(own.dtype))
            self.computes[part.name] = own.dtype
            copies.put(tensor, part.kind == "weight")
            if part.kind == "weight":
                new.append(copies[-1])
        return new  # type: ignore[return-value]

    def quantize(self, dtype: str) -> None:
        """Keep the matrices of feed-forwards in low precision, and nothing else of them."""
        assert isinstance(self.site, FeedForwardSite)
        matrices = dict(self.site.matrices)
        for part, copies in self._by_part():
            if part.name in matrices:
                if self.residents is not None:
                    copies.to(self.residents.device)
                copies.quantize(dtype, matrices[part.name])
            for own in copies.own():
                own.requires_grad_(False).grad = None
        self.quantized = dtype
        self.forget()
        self.settle()

    def _by_part(self) -> list[tuple[Part, _Copies]]:
        return list(zip(self.site.parts, self._of_part, strict=True))

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(c.own()) for p, c in self._by_part() if p.kind == "weight"]

    def remove(self, index: int) -> None:
        for _, copies in self._by_part():
            copies.remove(index)
        self.forget()

    def remove_last(self) -> None:
        self.remove(len(self._of_part[0]) - 1)

    def merged(
        self, expert: int, dense: dict[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        shares = any(copies[expert].shape != dense[p.name].shape for p, copies in self._by_part())
        if isinstance(self.site, FeedForwardSite) and shares:
            raise ConfigError(
                f"{self.site.name}: an expert is a part of a copy, no dense feed-forward"
            )
        if isinstance(self.site, RegionSite):
            raise ConfigError(
                f"{self.site.name}: an expert of a region works on patches of its own; a dense model "
                "has none"
            )
        return {
            part.name: copies[expert].detach().to(dense[part.name].device)
            for part, copies in self._by_part()
        }

    def stacked_apart(self, active: Sequence[int]) -> tuple[torch.Tensor, ...] | None:
        if not self._stackable or not active:
            return None
        return tuple(torch.stack(list(of_part)) for of_part in self.stacked(active))

    def stacked(self, active: Sequence[int]) -> tuple[list[Any], ...]:
        own = [self._of_expert(e) for e in active]  # one after another, as copies come and go
        return tuple([of[i] for of in own] for i in range(len(self._of_part)))

    def _of_expert(self, expert: int) -> list[Any]:
        return [
            self._matrix(part.name, expert, copies)
            if copies.quantized
            else self.in_graph(part.name, expert, copies[expert])
            for part, copies in self._by_part()
        ]

    def _matrix(self, part: str, expert: int, copies: _Copies) -> LowPrecision:
        """Its scales, which are small, lie on the device."""
        own = copies.matrix(expert)
        if self.residents is None or not self.residents.serves(own.values):
            return own
        values = self.residents.of(part, expert, own.values, own.values.dtype)
        return LowPrecision(values, own.scale)


class _Copies(nn.Module):
    """One part of every expert, by number: parameters or buffers; matrices in low precision have
    their scales, if any, in a module below."""

    quantized = False

    def own(self) -> Iterator[nn.Parameter]:
        return self.parameters(recurse=False)

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

    def remove(self, index: int) -> None:
        tables: Any = (self._parameters, self._buffers)
        for table in tables:
            kept = [tensor for key, tensor in table.items() if key != str(index)]
            table.clear()
            table.update({str(e): tensor for e, tensor in enumerate(kept)})
        if "scales" in self._modules:
            self.scales.remove(index)

    @torch.no_grad()
    def quantize(self, dtype: str, transposed: bool) -> None:
        """transposed: weights are stored as (in, out)."""
        scales, self.quantized = _Copies(), True
        for key, weight in self._parameters.items():
            assert weight is not None
            made = LowPrecision.of(weight.t() if transposed else weight.flatten(1), dtype)
            self._parameters[key] = nn.Parameter(made.values, requires_grad=False)
            if made.scale is not None:
                scales.register_parameter(key, nn.Parameter(made.scale, requires_grad=False))
        if len(scales):
            self.scales = scales

    def matrix(self, index: int) -> LowPrecision:
        return LowPrecision(self[index], self.scales[index] if "scales" in self._modules else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move matrices in low precision with the model, and do not cast them."""
        if not self.quantized:
            return super()._apply(fn, recurse)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            given = fn(tensor)
            return given if given.dtype == tensor.dtype else tensor.to(given.device)

        return super()._apply(moved, recurse)


def _share(dense: torch.Tensor, part: Part, expert: int) -> torch.Tensor:
    """A copy of an expert's share of a dense tensor: the expert's own slice of each dimension in
    `part.kept`; after the last slice it starts from the front again."""
    share = dense.detach()
    for dim, kept in part.kept:
        full = dense.shape[dim]
        index = (expert * kept + torch.arange(kept, device=dense.device)) % full
        share = share.index_select(dim, index)
    return share.clone()
