"""Who owns which tensor: every dense tensor and every expert belongs to one block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..experts.base import ExpertParameters
from ..frontend.weights.structural_copy import canonical_names
from ..ir.steps import Emitted, Step
from ..routing.plan_views import OffDevice
from ..utils.module_tree import Holder, node_at, put_tensor, vars_of
from ..utils.quantized import dequantized, is_quantized, stand_ins
from ..utils.sharded import (
    Sharding,
    alike,
    gathered,
    in_process_group,
    is_engine,
    is_sharded,
    own_part,
    without_shards,
)
from ..utils.zero_stage_3 import is_parted_by_zero
from .graphs.block_module import BlockModule, BlockRun, Bound, Slot, block_class


class ParameterStore:
    """Where each tensor of the host lives in a converted model: in a tree of modules under its
    state-dict name, tied names included. Blocks share the modules of this tree.

    root: the converted model, the root of the tree.
    shallow, deep: blocks before and after the cut.
    rest: tensors that no graph uses; their names are `unused`.
    slots: where each tensor is, by canonical state-dict name.
    sites: the experts' modules, by site.
    aliases: tied state-dict name -> the canonical one.
    copied: tensors that no longer share the original's storage, since training writes to them.
    written_names: those among them that a forward pass writes to.
    off_device: which experts' weights lie off the device.
    parallel: the mesh of processes that each compute with their parts of sharded weights, and hold
        what conversion added whole (tensor parallel); else None.
    """

    def __init__(
        self, root: nn.Module, host: nn.Module, emitted: Emitted,
        experts: dict[str, ExpertParameters],
    ) -> None:  # fmt: skip
        """experts: by the name of a site."""
        self.root = root
        self.slots: dict[str, Slot] = {}
        self.sites: dict[str, ExpertParameters] = {}
        self.copied: set[str] = set()
        self.written_names: set[str] = set()
        self.off_device = OffDevice()
        self.parallel: Any = None
        self.rest = BlockModule("unused by the graph")
        self._persistent = set(host.state_dict(keep_vars=True))
        names = canonical_names(host)
        self.aliases = {k: v for k, v in names.items() if k != v and k in self._persistent}
        self._tied: list[tuple[Slot, str]] = []  # (place of a tied name, canonical name)
        self._fill_tree(host, names)
        self._held: set[int] = set()  # ids of modules of the tree that a block holds
        self._of_root: list[tuple[nn.Module, Slot]] = []  # (Holder in a block, slot of the root)
        layers = dict(host.named_modules())
        halves: dict[bool, list[BlockModule]] = {False: [], True: []}
        placed: set[str] = set()
        for step in emitted.steps:
            block = block_class(layers.get(step.block))(step.block)
            halves[step.deep].append(block)
            for kind, name in step.owned:
                if kind in ("weight", "buffer"):
                    self._give(block, name, placed)
                elif kind == "expert" and (site := name.rpartition(":")[0]) not in self.sites:
                    self.sites[site] = block.add_site(site, experts[site])
        self.shallow, self.deep = BlockRun(halves[False]), BlockRun(halves[True])
        self.unused = [name for name in self.slots if name not in placed]
        for name in self.unused:
            self._give(self.rest, name, placed)

    def _fill_tree(self, host: nn.Module, names: dict[str, str]) -> None:
        for path, module in host.named_modules(remove_duplicate=False):
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = f"{path}.{leaf}" if path else leaf
                if tensor is None:
                    continue
                holder = node_at(self.root, path)
                slot = Slot(
                    holder, put_tensor(holder, leaf, tensor, name in self._persistent), leaf
                )
                if names[name] == name:
                    self.slots[name] = slot
                else:
                    self._tied.append((slot, names[name]))

    def _give(self, block: BlockModule, name: str, placed: set[str]) -> None:
        """Let a block hold the module of the tree that holds this tensor, unless another does."""
        if name in placed:
            return
        placed.add(name)
        slot = self.slots[name]
        for tied, first in self._tied:  # both places in one block, for engines that shard it
            if first == name and len(vars_of(tied.module)) == 1 and tied.module is not self.root:
                block.weights.append(tied.module)
        if slot.module is self.root:  # a tensor beside the model's modules: alone, in a Holder
            holder = Holder()
            put_tensor(holder, slot.key, slot.get(), name in self._persistent)
            block.weights.append(holder)
            self._of_root.append((holder, slot))
        elif id(slot.module) not in self._held:
            self._held.add(id(slot.module))
            block.weights.append(slot.module)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        self.slots[name].set(tensor)
        self.tie()

    def tie(self) -> None:
        """Make every other place of a tensor hold what its slot holds, after a move or a copy."""
        for slot, name in self._tied:
            slot.set(self.slots[name].get())
        for holder, slot in self._of_root:
            getattr(holder, slot.table)[slot.key] = slot.get()

    def bind(self, emitted: Emitted) -> tuple[tuple[BlockModule, Bound], ...]:
        """Every step of a graph, bound to its tensors, with the block that runs it."""
        blocks = {
            (b.name, deep): b
            for deep, half in ((False, self.shallow), (True, self.deep))
            for b in half
        }

        def place(kind: str, name: str) -> Any:
            if kind == "expert":
                site, _, part = name.rpartition(":")
                return (self.sites[site], self.sites[site].parts.index(part))
            return emitted.constants[name] if kind == "constant" else self.slots[name]

        def bound(step: Step) -> Bound:
            slots = tuple(place(*o) for o in step.owned)
            dtypes = (ref.get().dtype if isinstance(ref, Slot) else None for ref in slots)
            return Bound(step, slots, tuple(dtypes))

        return tuple((blocks.get((s.block, s.deep), self.rest), bound(s)) for s in emitted.steps)

    def load_into(self, host: nn.Module) -> None:
        """Make the host use these tensors as they are now (after a move or a cast); of those that
        are sharded, empty ones of the whole size, since a capture reads no values, or (tensor
        parallel) this process's parts."""
        take = without_shards if self.parallel is None else own_part
        whole: dict[str, torch.Tensor] = {}
        for name, first in canonical_names(host).items():
            parent, _, leaf = name.rpartition(".")
            module = host.get_submodule(parent)
            table: Any = module._parameters if leaf in module._parameters else module._buffers
            if first not in whole:
                whole[first] = take(self.slots[first].get())
            table[leaf] = whole[first]

    @property
    def sharded(self) -> bool:
        """Whether this process holds only parts of some tensors, now or between calls."""
        if not in_process_group():
            return False
        tensors = (slot.get() for slot in self.slots.values())
        parts = (self.root, *self.shallow, *self.deep)
        return any(map(is_sharded, tensors)) or any(map(is_engine, parts))

    def divided(self, modules: Iterable[nn.Module], new: list[nn.Parameter]) -> list[nn.Parameter]:
        """New parameters of these modules, sharded as the model is; in all processes alike. Under
        tensor parallel they stay whole."""
        if self.parallel is not None:
            alike(new, self.parallel)
            return new
        if not self.sharded:
            return new
        for module in filter(is_engine, self.root.modules()):
            module.reshard()  # type: ignore[operator]
        sharding = Sharding.of(slot.get() for slot in self.slots.values())
        return new if sharding is None else sharding.divide(modules, new)

    @property
    def written_by_another(self) -> bool:
        """Whether another process than this one writes files of a sharded model."""
        return self.sharded and torch.distributed.get_rank() != 0

    def require_whole(self, what: str) -> None:
        """Raise ConfigError for a change that cannot be made while a model is sharded."""
        if self.sharded:
            raise ConfigError(
                f"{what}: this model is sharded over processes by an engine that holds its tensors. "
                "Save it (save_pretrained, in all processes), load it again, and call this before it "
                "is sharded"
            )

    def require_room(self) -> None:
        """Raise ConfigError where no expert can be added, since ZeRO stage 3 would not know of it."""
        if any(is_parted_by_zero(slot.get()) for slot in self.slots.values()):
            raise ConfigError(
                "expand(): DeepSpeed's ZeRO stage 3 has taken this model's weights, and would not "
                "train new ones: save it (save_pretrained, in all processes), load it again, expand "
                "it, then call deepspeed.initialize"
            )

    def require_plain(self, what: str) -> None:
        """Raise ConfigError if a dense tensor is quantised."""
        quantized = [name for name, slot in self.slots.items() if is_quantized(slot.get())]
        if quantized:
            raise ConfigError(
                f"{what}: {quantized[0]} and {len(quantized) - 1} more weights are quantised, which "
                "files of this package do not hold: save what was added (the default), and the base "
                "by the library that quantised it"
            )

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole ones, in a sharded model."""
        return {name: gathered(self.slots[name].get()) for name in names}

    def like(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The same, quantised ones as plain tensors without values: what new experts are made like,
        which copy no quantised weight."""
        tensors = self.tensors(names)
        if not any(map(is_quantized, tensors.values())):
            return tensors
        plain = stand_ins(slot.get() for slot in self.slots.values())
        return {name: plain.get(id(t), t) for name, t in tensors.items()}

    def dequantized(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The same, quantised ones as plain tensors with the values that they stand for."""
        return dequantized(self.tensors(names), (slot.get() for slot in self.slots.values()))

    def copy_on_write(self, *names: str) -> None:
        """Give these tensors their own storage before they are written to, since the original must
        not change. Unknown names are ignored."""
        for name in (n for n in names if n in self.slots and n not in self.copied):
            own = self.slots[name].get().detach().clone()
            weight = self.slots[name].table == "_parameters"
            trains = self.slots[name].get().requires_grad
            self._set(name, nn.Parameter(own, trains) if weight else own)
            self.copied.add(name)

    def unfreeze(self) -> None:
        """Make every dense weight that a graph uses trainable, except what experts replace."""
        replaced = {w for s in self.sites.values() for w in s.replaced}
        left = replaced.union(self.unused)
        if quantized := [n for n in self.slots.keys() - left if is_quantized(self.slots[n].get())]:
            raise ConfigError(
                f"freeze=False: {min(quantized)} and {len(quantized) - 1} more weights are quantised, "
                "which cannot be trained: leave the base frozen, or convert one that is not quantised"
            )
        for name, slot in self.slots.items():
            runs = slot.table == "_parameters" and name not in left
            if runs and slot.get().is_floating_point():
                self.copy_on_write(name)
                self.slots[name].get().requires_grad_()

    def written(self) -> dict[str, torch.Tensor]:
        """The dense tensors that a forward pass writes to, by name."""
        return self.tensors(self.written_names)

    def copy_written(self, steps: tuple[Step, ...]) -> None:
        owned = (s.owned[i] for s in steps for i in s.writes if i < len(s.owned))
        names = {name for kind, name in owned if kind in ("weight", "buffer")}
        self.copy_on_write(*names)
        self.written_names |= names

    def written_tensors(self) -> dict[str, torch.Tensor]:
        """The persistent dense tensors that training may have changed, by name."""
        return {n: self.slots[n].get() for n in sorted(self.copied & self._persistent)}

    def persistent_tensors(self) -> dict[str, torch.Tensor]:
        """The dense tensors of a state dict, each once, by name."""
        return {n: slot.get() for n, slot in self.slots.items() if n in self._persistent}


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating-point parameter."""
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.get_default_dtype()
