"""The converted model's modules: a block owns its tensors once and runs the steps given to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError
from ...experts.base import SEPARATOR, ExpertParameters
from ...ir.steps import Step
from ...routing.plan_views import Active
from ...utils.sharded import gathered_to_run, in_process_group


@dataclass(frozen=True)
class Slot:
    """Where a tensor lives: looked up at each call, so that moving a model just works."""

    module: nn.Module
    table: str  # "_parameters" or "_buffers"
    key: str

    def get(self) -> torch.Tensor:
        """By `get`: an item that DeepSpeed's ZeRO stage 3 has emptied would be filled at once."""
        return getattr(self.module, self.table).get(self.key)

    def set(self, tensor: torch.Tensor) -> None:
        getattr(self.module, self.table)[self.key] = tensor


@dataclass(frozen=True)
class Bound:
    """A step bound to the tensors that its code takes first.

    slots: for each of them a Slot, a constant, or (the site's module, index of its part).
    dtypes: of the tensors in Slots when the graph was captured; None for the others.
    """

    step: Step
    slots: tuple[Any, ...]
    dtypes: tuple[torch.dtype | None, ...]

    def require_dtypes(self, tensors: list[Any]) -> None:
        """Raise ConfigError if an engine casts weights: operations that keep to a wider dtype
        (norms, softmax) are in the graph only if it was captured in the narrower one."""
        for tensor, dtype in zip(tensors, self.dtypes, strict=True):
            if dtype is not None and tensor.dtype != dtype:
                raise ConfigError(
                    f"weights that were captured in {dtype} are run in {tensor.dtype} by an engine "
                    "(MixedPrecisionPolicy(param_dtype=...), accelerate's mixed_precision with "
                    "FSDP2): leave that out, and cast the dense model before convert(), "
                    "model.to(torch.bfloat16); its experts and router stay in float32"
                )


class BlockModule(nn.Module):
    """One block of the model. It holds tensors, no graph: `forward` is given the step to run.

    weights: modules of the model's tree that hold this block's dense tensors.
    experts: its sites' modules.
    run_on: what its code is given of a sharded tensor: all of it, or (tensor parallel) this process's
        part.
    """

    run_on: Callable[[Any], Any]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.run_on = name, gathered_to_run
        self.weights = nn.ModuleList()
        self.experts = nn.ModuleDict()
        self._recomputing = False

    def add_site(self, name: str, site: ExpertParameters) -> ExpertParameters:
        self.experts[name.replace(".", SEPARATOR)] = site
        return site

    def forward(
        self, bound: Bound, active: Active | None, *values: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run one step on the values it takes. active: None before the cut, where no experts are."""
        stacks: dict[int, tuple[Any, ...]] = {}
        owned = []
        for ref in bound.slots:
            if type(ref) is Slot:
                owned.append(getattr(ref.module, ref.table)[ref.key])
            elif type(ref) is tuple:
                site, part = ref
                if id(site) not in stacks:
                    assert active is not None
                    stacks[id(site)] = site.stacked(active.on if site.of_all else active.run)
                owned.append(stacks[id(site)][part])
            else:
                owned.append(ref)
        if in_process_group():  # tied to a tensor of another block, or sharded elsewhere
            owned = pytree.tree_map(self.run_on, owned)
            bound.require_dtypes(owned)
        arguments = [*owned, *values]
        if self._recomputing:
            for i in bound.step.writes:  # a second run must not count a batch twice
                arguments[i] = pytree.tree_map(torch.clone, arguments[i])
        return bound.step.code.call(*arguments)

    def checkpointed(self, bound: Bound, active: Active | None, *values: Any) -> Any:
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


LAYERS: dict[str, type[BlockModule]] = {}


def block_class(layer: nn.Module | None) -> type[BlockModule]:
    """The class of the block that runs a layer of the original: it has the layer's name, by which
    tools that shard, compile or checkpoint layer by layer find what to wrap."""
    if layer is None or not layer._modules:
        return BlockModule
    name = type(layer).__name__
    return LAYERS.setdefault(name, type(name, (BlockModule,), {"__module__": __name__}))


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
