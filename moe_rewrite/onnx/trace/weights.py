"""The tensors of a converted model by name, experts stacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ...converted.graphs.bound_graph import BoundGraph
from ...converted.saving.state_dict import ADDED
from ...utils.quantized import dequantized

if TYPE_CHECKING:
    from ...converted.model import MoEModel

ROWS = f"{ADDED}router.rows"


@dataclass(frozen=True)
class ExpertDim:
    """The experts' dimension of a stack: `each` elements of dimension `dim` for every expert."""

    dim: int
    each: int


def tensors_of(
    moe: MoEModel, graph: BoundGraph, active: tuple[int, ...], open_experts: bool
) -> tuple[dict[str, torch.Tensor], dict[str, ExpertDim], dict[str, Any]]:
    """Returns all tensors by name; the stacks among them; and what each expert input of the graph
    takes, with names instead of tensors. open_experts: stack copies of a feed-forward too."""
    tensors: dict[str, torch.Tensor] = {}
    stacks: dict[str, ExpertDim] = {}
    for _, bound in graph.steps:
        for (kind, name), slot in zip(bound.step.owned, bound.slots, strict=True):
            if kind in ("weight", "buffer"):
                tensors[name] = slot.get().detach()
    tensors = dequantized(tensors, tensors.values())
    experts: dict[str, Any] = {}
    for site in moe.expert_sites():
        base = f"{ADDED}experts.{site.site.name}."
        with torch.no_grad():
            apart = site.stacked_apart(active) if open_experts else None
            stacked = apart or site.stacked(active)
        for part, stack in zip(site.parts, stacked, strict=True):
            names, named = site.named(part, stack, active)
            tensors |= {base + name: tensor for name, tensor in named.items()}
            experts[f"{site.site.name}:{part}"] = pytree.tree_map_only(str, base.__add__, names)
            dim = (0, 1) if apart else site.expert_dim(part)
            if active and dim is not None and part not in site.whole:
                stacks[base + part] = ExpertDim(*dim)
    if active and not moe.router.by_layer:
        tensors[ROWS] = moe.router.stacked(active).detach()
        stacks[ROWS] = ExpertDim(0, 1)
    if any(isinstance(v, list) and v for v in experts.values()):
        stacks = {}  # experts that are not stacked: their number is fixed
    for name in ("lift", "frozen"):
        if name in moe.router._buffers:
            tensors[f"{ADDED}router.{name}"] = moe.router._buffers[name]  # type: ignore[assignment]
    return tensors, stacks, experts
