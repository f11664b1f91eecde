"""Layers of a model of whose weights each process has a part, by the model's tensor parallel plan.

They stand in a host in place of its own while graphs are captured, as transformers' hooks do when it
loads a model with a plan: the modules around them see fewer heads and fewer hidden units.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from ...utils.collectives import Copied, Summed

FSDP = "fully_shard for each block of moe.shallow and moe.deep, then for moe (docs/many_gpus.md)"


@dataclass(frozen=True)
class Part:
    """The part of one process: elements start..stop-1 of `whole` along a dimension `dim` of a weight.
    group: name of the group of processes."""

    dim: int
    start: int
    stop: int
    whole: int
    group: str

    @classmethod
    def of(cls, whole: int, dim: int, mesh: Any) -> Part:
        """As `torch.chunk` divides, and so DTensor."""
        size = -(-whole // mesh.size())
        start = min(mesh.get_local_rank() * size, whole)
        return cls(dim, start, min(start + size, whole), whole, mesh.get_group().group_name)


class Columns(nn.Linear):
    """Some of the outputs, from a whole input; style "colwise"."""

    part: Part

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(Copied.apply(input, self.part.group), self.weight, self.bias)


class GatheredColumns(Columns):
    """All outputs; style "colwise_gather_output"."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        part, own = self.part, super().forward(input)
        return Summed.apply(F.pad(own, (part.start, part.whole - part.stop)), part.group)


class Rows(nn.Linear):
    """All outputs, from the inputs of this process; style "rowwise"."""

    part: Part

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made = Summed.apply(F.linear(input, self.weight), self.part.group)
        return made if self.bias is None else made + self.bias


class SplitRows(Rows):
    """The same from a whole input; style "rowwise_split_input"."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        part = self.part
        return super().forward(Copied.apply(input, part.group)[..., part.start : part.stop])


class EmbeddingRows(nn.Embedding):
    """An embedding of which each process has some of the rows; style "embedding_rowwise"."""

    part: Part

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        part = self.part
        own = (input >= part.start) & (input < part.stop)
        found = super().forward(torch.where(own, input - part.start, 0))
        return Summed.apply(found.masked_fill(~own.unsqueeze(-1), 0.0), part.group)


@dataclass(frozen=True)
class Style:
    """One of transformers' styles. layer: what computes with a part. dim: along which the weight is
    divided. even: parts must be of one size, since more than this layer depends on it."""

    layer: Any
    dim: int
    even: bool = False

    @property
    def dims(self) -> dict[str, int]:
        """The dimension along which each tensor of the module is divided."""
        bias = {"bias": 0} if issubclass(self.layer, Columns) else {}
        return {"weight": self.dim} | bias


STYLES: dict[str, Style | None] = {
    "colwise": Style(Columns, 0, even=True),
    "colwise_gather_output": Style(GatheredColumns, 0),
    "rowwise": Style(Rows, 1, even=True),
    "rowwise_split_input": Style(SplitRows, 1),
    "embedding_rowwise": Style(EmbeddingRows, 0),
    "replicated_with_grad_allreduce": None,  # whole; a frozen weight has no gradient
}


@dataclass(frozen=True)
class Planned:
    """What a plan says of one module."""

    name: str
    module: Any
    style: Style


def planned(model: nn.Module, plan: dict[str, str]) -> list[Planned]:
    """The modules of a model that its plan divides, with embeddings whose weight is that of one of
    them. Raises ConfigError for a style or a class of modules that cannot be divided."""
    found = list(_named(model, plan))
    tied = {id(p.module.weight) for p in found if p.style.dim == 0}
    known = {id(p.module) for p in found}
    for name, module in model.named_modules():
        if id(module) not in known and id(getattr(module, "weight", None)) in tied:
            style = STYLES["embedding_rowwise"]
            assert style is not None
            found.append(_checked(Planned(name, module, style)))
    return found


def _named(model: nn.Module, plan: dict[str, str]) -> Iterator[Planned]:
    patterns = {re.compile(re.escape(p).replace(r"\*", r"\d+")): style for p, style in plan.items()}
    for name, module in model.named_modules():
        for pattern, style in patterns.items():
            if not pattern.fullmatch(name):
                continue
            if style not in STYLES:
                raise ConfigError(
                    f"the plan divides {name} by {style!r}, and tensor_parallel knows "
                    f"{', '.join(STYLES)}: divide this model by FSDP2, {FSDP}"
                )
            if (how := STYLES[style]) is not None:
                yield _checked(Planned(name, module, how))
            break


def _checked(of: Planned) -> Planned:
    embeds = of.style.layer is EmbeddingRows
    fits = isinstance(of.module, nn.Embedding) if embeds else type(of.module) is nn.Linear
    if not fits or getattr(of.module, "max_norm", None) is not None:
        expected = "an nn.Embedding without max_norm" if embeds else "an nn.Linear"
        raise ConfigError(
            f"{of.name} is a {type(of.module).__name__}, which tensor_parallel cannot divide: "
            f"expected {expected}; divide this model by FSDP2, {FSDP}"
        )
    return of


def replace_layer(of: Planned, mesh: Any) -> dict[str, Part]:
    """Make a module compute with this process's parts of its tensors; returns these by name. Raises
    ConfigError where a process would get none, or parts would differ in size that must not."""
    style, n = of.style, mesh.size()
    whole = of.module.weight.shape[style.dim]
    last = (n - 1) * -(-whole // n)  # where the last process's part starts
    if last >= whole or (style.even and whole % n):
        raise ConfigError(
            f"{of.name}.weight, {tuple(of.module.weight.shape)}, cannot be divided over {n} "
            f"processes along dimension {style.dim}: expected a multiple of {n}, or fewer processes"
        )
    kind: Any = type(of.module)
    of.module.__class__ = _over(style.layer, kind)
    of.module.part = Part.of(whole, style.dim, mesh)
    tensors = {"weight": of.module.weight, "bias": getattr(of.module, "bias", None)}
    return {
        leaf: replace(of.module.part, dim=dim)
        for leaf, dim in style.dims.items() if tensors[leaf] is not None
    }  # fmt: skip


def restore_layers(classes: dict[nn.Module, type[nn.Module]]) -> None:
    """Undo `replace_layer`. classes: those that the modules had."""
    for module, kind in classes.items():
        if type(module) is not kind:
            module.__class__ = kind
            vars(module).pop("part")


@cache
def _over(layer: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The layer over a model's own class, whose forward may do more (scale what it found)."""
    return type(f"Divided{kind.__name__}", (layer, kind), {"__module__": __name__})
