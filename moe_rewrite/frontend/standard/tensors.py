"""The tensors of a class from those of a converted model, and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import CheckpointError
from . import names
from .formats import Wanted, head_dim, rope

ROTATED = ("q_proj", "k_proj")
SHARED_GATE = "shared_expert_gate.weight"


@dataclass(frozen=True)
class RegionTensors:
    """An expert a place; views of what they are in a converted model. rows: of its router. shared:
    the experts that every row has, whose `rows` is their gate, or empty; None without."""

    gate: Sequence[torch.Tensor]
    up: Sequence[torch.Tensor]
    down: Sequence[torch.Tensor]
    rows: Sequence[torch.Tensor]
    shared: RegionTensors | None = None


def interleaved(model: nn.Module) -> bool:
    """Whether a model's rotary embedding turns neighbours of a head's features, not its halves: from
    the function of its module."""
    turn = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    return turn is not None and turn(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0]


def class_state(
    wanted: Wanted, model: nn.Module, regions: Mapping[str, RegionTensors]
) -> dict[str, torch.Tensor]:
    """The state dict of the class, in the dtypes of the dense model. regions: by name."""
    turned = wanted.interleaved != interleaved(model)
    state: dict[str, torch.Tensor] = {}
    blocks = {region: names.block_of(model, region) for region in regions}
    inside = {k for b in blocks.values() for k in (b.first, b.down, b.rows, *b.rest)}
    like = next(t for t in wanted.dense.values() if t.is_floating_point())
    there = model.state_dict()
    for key in there:
        if key not in inside:
            (source,) = names.sources(key, wanted.dense)
            tensor, half = wanted.dense[source].detach(), names.half_of(key, source)
            tensor = tensor if half is None else tensor.chunk(2)[half]
            state[key] = tensor[_order(wanted, len(tensor))] if turned and _turns(key) else tensor
    for region, block in blocks.items():
        of = regions[region]
        first = [torch.cat([g, u]) for g, u in zip(of.gate, of.up, strict=True)]
        for key, own in ((block.first, first), (block.down, of.down), (block.rows, of.rows)):
            state[key] = torch.stack([t.detach().to(like.dtype) for t in own])
        for key in block.rest:
            kept = there[key].dtype if key.endswith("correction_bias") else like.dtype
            state[key] = _beside(key, there[key].shape, of.shared, block.rest).to(kept)
    return {k: t.contiguous().clone() for k, t in state.items()}


def _beside(
    key: str, shape: torch.Size, shared: RegionTensors | None, rest: Sequence[str]
) -> torch.Tensor:
    """A tensor of a block beside its routed experts: of the shared one or its gate, or a bias."""
    if shared is None:
        # of the gate of one that adds nothing any value does; at a logit of 0 llama.cpp divides by it
        return torch.full(shape, 1.0 if key.endswith(SHARED_GATE) else 0.0)
    if key.endswith(SHARED_GATE) and shared.rows:
        return torch.stack([t.detach() for t in shared.rows])
    parts, lists = key.split("."), {"gate_proj": shared.gate, "up_proj": shared.up}
    for name, own in lists.items():
        if name in parts:
            return torch.cat([t.detach() for t in own])
    if "down_proj" in parts:
        halved = any(k.endswith(SHARED_GATE) for k in rest) and not shared.rows  # sigmoid(0)
        return torch.cat([t.detach() for t in shared.down], 1) * (2 if halved else 1)
    return torch.zeros(shape)


@torch.no_grad()
def fill(
    wanted: Wanted, model: nn.Module, state: Mapping[str, torch.Tensor],
    regions: Mapping[str, RegionTensors],
) -> None:  # fmt: skip
    """The inverse of `class_state`: write a class's tensors into those of a converted model."""
    turned = wanted.interleaved != interleaved(model)
    blocks = {region: names.block_of(model, region) for region in regions}
    inside = {k for b in blocks.values() for k in (b.first, b.down, b.rows, *b.rest)}
    for block in blocks.values():
        _require_no_bias(state, block.rest)
    for key in model.state_dict():
        if key not in inside:
            (source,) = names.sources(key, wanted.dense)
            into, half = wanted.dense[source].detach(), names.half_of(key, source)
            into, tensor = into if half is None else into.chunk(2)[half], state[key]
            if turned and _turns(key):
                tensor = tensor[_order(wanted, len(tensor)).argsort()]
            if not torch.equal(into, tensor.to(into)):  # shared with the original, if equal
                into.copy_(tensor)
    for region, block in blocks.items():
        of = regions[region]
        for e, first in enumerate(state[block.first]):
            gate, up = first.chunk(2)
            for into, tensor in (
                (of.gate[e], gate), (of.up[e], up), (of.down[e], state[block.down][e]),
                (of.rows[e], state[block.rows][e]),
            ):  # fmt: skip
                into.detach().copy_(tensor)
        if of.shared is not None:
            _fill_shared(of.shared, state, block.rest)


def _fill_shared(of: RegionTensors, state: Mapping[str, torch.Tensor], keys: Sequence[str]) -> None:
    lists = {"gate_proj": of.gate, "up_proj": of.up, "down_proj": of.down, SHARED_GATE: of.rows}
    for key in keys:
        for name, own in lists.items():
            if f".{name}" in key:
                (into,) = own
                into.detach().copy_(state[key].view_as(into))


def shared_of(state: Mapping[str, torch.Tensor], keys: Sequence[str]) -> tuple[int, bool] | None:
    """(width of a block's shared expert, whether it has a gate); None if it adds nothing, since its
    last product is zero. keys: `Block.rest`."""
    down = [state[k] for k in keys if "down_proj" in k]
    if not any(bool(t.any()) for t in down):
        return None
    return down[0].shape[1], any(k.endswith(SHARED_GATE) for k in keys)


def _require_no_bias(state: Mapping[str, torch.Tensor], keys: Sequence[str]) -> None:
    for key in keys:
        if key.endswith("correction_bias") and bool(state[key].any()):
            raise CheckpointError(
                f"{key} is not zero: a converted model has no bias for the choice of experts; only "
                "folders in which it is zero are read"
            )


def _turns(key: str) -> bool:
    return any(name in key.split(".") for name in ROTATED)


def _order(wanted: Wanted, rows: int) -> torch.Tensor:
    """The rows of a projection to queries or keys in the order in which halves are turned."""
    width = head_dim(wanted.config)
    turned = int(width * rope(wanted.config)["partial_rotary_factor"])
    head = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, width)]
    return torch.cat([torch.tensor(head) + width * h for h in range(rows // width)])
