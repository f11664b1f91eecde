"""The parameters of LoRA experts: one module a site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...ir.sites import LoRASite
from ...utils.latest import Latest
from ...utils.sharded import gathered, is_sharded, is_traced, without_shards
from ..base import ExpertParameters
from .mean import nearest_to_mean


class LoRAParameters(ExpertParameters):
    """LoRA experts of one linear map or convolution.

    a[e]: (rank, in, *kernel); beside the model's own G experts (rank, in, G).
    b[e]: (out, rank), or (out, rank, 1, ...) for a convolution, or (out, rank, G); zero at the start.
    """

    site: LoRASite
    parts = ("a", "b")
    as_adapter = True
    offloads = True

    def __init__(self, site: LoRASite, rank: int) -> None:
        super().__init__()
        self.site, self.rank = site, rank
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        self._stack: tuple[object, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._latest: Latest | None = None
        self._transposed: Latest | None = None

    def __len__(self) -> int:
        return len(self.a)

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        like = dense[self.site.weight]
        apart = (self.site.groups,) if self.site.groups else ()
        dtype = self.dtype_for(like.dtype)
        self.computes = dict.fromkeys(self.parts, like.dtype)
        a = like.new_empty(self.rank, self.site.in_features, *self.site.kernel, *apart, dtype=dtype)
        if not a.is_meta:
            for own in a.unbind(-1) if apart else (a,):
                nn.init.kaiming_uniform_(own, a=math.sqrt(5))
        b = self._no_b(like, self.rank, dtype)
        self.a.append(nn.Parameter(a))
        self.b.append(nn.Parameter(b))
        return [self.a[-1], self.b[-1]]

    def _no_b(self, like: torch.Tensor, rank: int, dtype: torch.dtype) -> torch.Tensor:
        apart = (self.site.groups,) if self.site.groups else ()
        ones = (1 for _ in self.site.kernel)
        return like.new_zeros(self.site.out_features, rank, *ones, *apart, dtype=dtype)

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        return [list(self.a), list(self.b)]

    def remove(self, index: int) -> None:
        self.a, self.b = (
            nn.ParameterList(p for e, p in enumerate(of) if e != index) for of in (self.a, self.b)
        )
        self.forget()

    def remove_last(self) -> None:
        self.remove(len(self) - 1)

    def merged(
        self, expert: int, dense: dict[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        site, weight = self.site, dense[self.site.weight]
        a, b = (of[expert].detach().to(weight.device) for of in (self.a, self.b))
        delta = (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:]) * scale
        if site.transposed and not site.kernel:
            delta = delta.T
        if site.groups or site.transposed and site.kernel or delta.shape != weight.shape:
            raise ConfigError(
                f"{site.name}: its weight is {tuple(weight.shape)}, and the expert adds another map "
                f"beside it: leave it out by LoRAExperts(sites=[...]) to merge experts"
            )
        return {site.weight: weight + delta}

    @torch.no_grad()
    def join(self, experts: Sequence[int], weights: Sequence[float]) -> float:
        grouped = bool(self.site.groups)

        def matrix(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(self.a[experts[0]].device)
            return tensor.movedim(-1, 0) if grouped else tensor.flatten(1)

        factors = [(matrix(self.a[e]), matrix(self.b[e])) for e in experts]
        *joined, error = nearest_to_mean(factors, weights, self.rank)
        for of, new in zip((self.a, self.b), joined, strict=True):
            old = of[experts[0]]
            filled = torch.zeros_like(matrix(old))  # narrow sites have fewer singular values
            filled[..., : new.shape[-2], : new.shape[-1]] = new
            old.copy_((filled.movedim(0, -1) if grouped else filled).view_as(old))
        return error

    def expert_dim(self, part: str) -> tuple[int, int] | None:
        return int(part == "b"), self.rank

    def forget(self) -> None:
        super().forget()
        self._stack = self._latest = self._transposed = None

    def stacked(self, active: Sequence[int]) -> tuple[Any, Any]:
        """A as (active * rank, in, ...) and B as (out, active * rank, ...).

        For a linear map in training, lists: a stack of the older, frozen experts and one tensor for
        each of the others. Stacks are cached until a parameter changes; in training mode, only
        those of frozen experts.
        """
        if self.training or torch.is_grad_enabled():
            return self._stacked(active)
        modules: Any = self._modules
        tables = modules["a"]._parameters, modules["b"]._parameters
        latest = self._latest
        if latest is not None and latest.serves(tables, active):
            return latest.value
        value = self._stacked(active)
        self._latest = Latest.of(tables, active, value) if self._keeps(active) else None
        return value

    def _keeps(self, active: Sequence[int]) -> bool:
        """Whether what is made of these experts may stay on the device."""
        return self.residents is None or len(active) == 1 and self.residents.device.type == "cpu"

    def transposed(self, active: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a linear map, `stacked` without gradients as products of rows take it: A (in, R) and
        B (R, out)."""
        modules: Any = self._modules
        tables = modules["a"]._parameters, modules["b"]._parameters
        latest = self._transposed
        if latest is not None and not self.training and latest.serves(tables, active):
            return latest.value
        a, b = self._stacked(active)
        value = a.t(), b.t()
        kept = self._keeps(active) and not self.training
        self._transposed = Latest.of(tables, active, value) if kept else None
        return value

    def _stacked(self, active: Sequence[int]) -> tuple[Any, Any]:
        if len(active) == 1:  # by the table: a ParameterList takes a microsecond an element
            name = str(active[0])
            one: Any = self.a._parameters[name], self.b._parameters[name]
            plain = one[0].dtype == self.computes["a"] and not is_sharded(one[0])
            if plain and self.residents is None:
                return one
            return self.in_graph("a", active[0], one[0]), self.in_graph("b", active[0], one[1])
        if not active:
            like, dtype = without_shards(self.a[0])[:0], self.computes["a"]
            if self.residents is not None:
                like = like.to(self.residents.device)
            return like.to(dtype), self._no_b(like, 0, dtype)
        a, b = [self.a[e] for e in active], [self.b[e] for e in active]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in (*a, *b))
        if not trains and self.residents is None:
            return self._kept(a, b)
        pairs = [
            (self.in_graph("a", e, own_a), self.in_graph("b", e, own_b))
            for e, own_a, own_b in zip(active, a, b, strict=True)
        ]  # an expert after another, as their copies come and go
        new_a, new_b = (list(of_part) for of_part in zip(*pairs, strict=True))
        if not trains or self.site.kernel or self.site.groups:
            return torch.cat(new_a), torch.cat(new_b, dim=1)
        frozen = next(i for i, p in enumerate(a) if p.requires_grad or b[i].requires_grad)
        if frozen < 2:
            return new_a, new_b
        if self.residents is None:
            older = self._kept(a[:frozen], b[:frozen])
        else:
            older = torch.cat(new_a[:frozen]), torch.cat(new_b[:frozen], dim=1)
        return [older[0], *new_a[frozen:]], [older[1], *new_b[frozen:]]

    def _kept(
        self, a: list[torch.Tensor], b: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.computes["a"]
        trained = self.training and any(p.requires_grad for p in (*a, *b))
        kept = not (is_traced(a[0]) or a[0].is_inference())  # which counts no versions
        if not kept or (trained and not is_sharded(a[0])):
            return torch.cat(a).to(dtype), torch.cat(b, dim=1).to(dtype)
        key = tuple((id(p), p._version, p.data_ptr()) for p in (*a, *b))
        if self._stack is None or self._stack[0] != key:
            with torch.no_grad():
                whole_a, whole_b = ([gathered(p) for p in of] for of in (a, b))
                self._stack = (
                    key, (torch.cat(whole_a).to(dtype), torch.cat(whole_b, dim=1).to(dtype))
                )  # fmt: skip
        return self._stack[1]
