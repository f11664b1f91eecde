"""The tensors of a converted model by name, experts in stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...converted.bound_graph import Graph
from ...converted.parameters import ADDED
from ...experts.base import ExpertSite
from ...experts.head import HeadColumns
from ...experts.lora.parameters import LoRASite
from ...ir.sites import FeedForwardSite

if TYPE_CHECKING:
    from ...converted.model import MoEModel

ROWS = f"{ADDED}router.rows"


@dataclass(frozen=True)
class Stack:
    """Where a tensor holds several experts: dimension `dim` has `each` elements for every one."""

    dim: int
    each: int


def tensors_of(
    moe: MoEModel, graph: Graph, active: tuple[int, ...], open_experts: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Stack], dict[str, Any]]:
    """All tensors by name; the stacks among them; per expert input of the graph, what it takes,
    with names in the place of tensors. open_experts: copies of a feed-forward are stacked too."""
    tensors: dict[str, torch.Tensor] = {}
    stacks: dict[str, Stack] = {}
    for _, bound in graph.steps:
        for kind, name in bound.step.owned:
            if kind in ("weight", "buffer"):
                tensors[name] = moe._owned.refs[name].get().detach()
    experts: dict[str, Any] = {}
    for site in moe.expert_sites():
        with torch.no_grad():
            stacked = site.stacked(active)
        for part, stack in zip(site.parts, stacked, strict=True):
            if open_experts and active and isinstance(site.site, FeedForwardSite):
                stack = torch.stack(list(stack))
                stacks[f"{ADDED}experts.{site.site.name}.{part}"] = Stack(0, 1)
            experts[f"{site.site.name}:{part}"] = _named(site, part, stack, active, tensors)
            if isinstance(site, LoRASite) and active:
                stacks[f"{ADDED}experts.{site.site.name}.{part}"] = Stack(
                    int(part == "b"), site.rank
                )
    if active:
        tensors[ROWS] = moe.router.stacked(active).detach()
        stacks[ROWS] = Stack(0, 1)
    if any(isinstance(v, list) and v for v in experts.values()):
        stacks = {}  # experts that are not stacked, of a fixed number
    for name in ("lift", "frozen"):
        if name in moe.router._buffers:
            tensors[f"{ADDED}router.{name}"] = moe.router._buffers[name]  # type: ignore[assignment]
    return tensors, stacks, experts


def _named(
    site: ExpertSite, part: str, stack: Any, active: tuple[int, ...],
    tensors: dict[str, torch.Tensor],
) -> Any:  # fmt: skip
    """`stack` with names for its tensors, which are put under them."""
    base = f"{ADDED}experts.{site.site.name}"
    if isinstance(stack, torch.Tensor):
        tensors[f"{base}.{part}"] = stack.detach()
        return f"{base}.{part}"
    if isinstance(site, HeadColumns):
        named: list[Any] = []
        for column in stack:
            if isinstance(column, int):
                named.append(column)
                continue
            names = [f"{base}.{kind}.{active[column[2]]}" for kind in ("weight", "bias")]
            tensors.update(zip(names, (t.detach() for t in column[:2]), strict=True))
            named.append((*names, column[2]))
        return named
    names = [f"{base}.{part}.{e}" for e in active]
    tensors.update(zip(names, (t.detach() for t in stack), strict=True))
    return names
