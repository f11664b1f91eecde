"""The converted model's modules: a block owns its tensors once and runs the steps given to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..experts.base import SEPARATOR, ExpertParameters
from ..ir.steps import Step
from ..utils.sharded import gathered


@dataclass(frozen=True)
class Slot:
    """Where a tensor lives: looked up at each call, so that moving a model just works."""

    module: nn.Module
    table: str  # "_parameters" or "_buffers"
    key: str

    def get(self) -> torch.Tensor:
        return getattr(self.module, self.table)[self.key]

    def set(self, tensor: torch.Tensor) -> None:
        getattr(self.module, self.table)[self.key] = tensor


@dataclass(frozen=True)
class Bound:
    """A step bound to the tensors that its code takes first.

    slots: for each of them a Slot, a constant, or (the site's module, index of its part).
    """

    step: Step
    slots: tuple[Any, ...]


class BlockModule(nn.Module):
    """One block of the model. It holds tensors, no graph: `forward` is given the step to run.

    weights: modules of the model's tree that hold this block's dense tensors.
    experts: its sites' modules.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weights = nn.ModuleList()
        self.experts = nn.ModuleDict()
        self._recomputing = False

    def add_site(self, name: str, site: ExpertParameters) -> ExpertParameters:
        self.experts[name.replace(".", SEPARATOR)] = site
        return site

    def forward(
        self, bound: Bound, active: tuple[int, ...], *values: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run one step on the values it takes; `active` are the experts that are on."""
        stacks: dict[int, tuple[Any, ...]] = {}
        owned = []
        for ref in bound.slots:
            if type(ref) is Slot:  # a tied weight may be sharded in another block
                owned.append(gathered(getattr(ref.module, ref.table)[ref.key]))
            elif type(ref) is tuple:
                site, part = ref
                if id(site) not in stacks:
                    stacks[id(site)] = site.stacked(active)
                owned.append(stacks[id(site)][part])
            else:
                owned.append(ref)
        arguments = [*owned, *values]
        if self._recomputing:
            for i in bound.step.writes:  # a second run must not count a batch twice
                arguments[i] = pytree.tree_map(torch.clone, arguments[i])
        return bound.step.code.call(*arguments)

    def checkpointed(self, bound: Bound, active: tuple[int, ...], *values: Any) -> Any:
        """`forward` with its activations recomputed in the backward pass (non-reentrant)."""
        first = len(bound.slots)
        if any(i >= first for i in bound.step.writes):  # it writes to its inputs: not run twice
            values = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values)
            return self(bound, active, *values)
        return checkpoint(
            self, bound, active, *values,
            use_reentrant=False, preserve_rng_state=True,
            context_fn=lambda: (nullcontext(), self._recompute()),
        )  # fmt: skip

    @contextmanager
    def _recompute(self) -> Iterator[None]:
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False


class BlockRun(nn.Module):
    """A run of blocks: the shallow or the deep half of the model."""

    def __init__(self, blocks: list[BlockModule]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[BlockModule]:
        return iter(self.blocks)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> BlockModule:
        return self.blocks[index]  # type: ignore[return-value]
