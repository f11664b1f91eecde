"""Who owns which tensor: every dense tensor and every expert belongs to one block.

State-dict names stay the original's; what conversion added stands under ``moe_rewrite.``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..experts.base import ExpertSite
from ..experts.factory import make_site
from ..frontend.capture import canonical_names
from ..ir.sites import AnySite
from ..ir.steps import Emitted, Step
from .block_module import SEPARATOR, Block, Bound, Ref, Segment

ADDED = "moe_rewrite."


class Ownership:
    """The blocks of a converted model, and where each tensor of the host lives in them.

    shallow, deep: the halves. rest: what no graph uses. refs: by canonical state-dict name.
    sites: the experts, by site. aliases: tied state-dict names to the canonical one.
    unshared: tensors that no longer share the original's storage, since training writes them.
    """

    def __init__(
        self, host: nn.Module, sites: tuple[AnySite, ...], emitted: Emitted, rank: int
    ) -> None:
        self.refs: dict[str, Ref] = {}
        self.sites: dict[str, ExpertSite] = {}
        self.unshared: set[str] = set()
        self.rest = Block("unused by the graph")
        self._tensors = dict([*host.named_parameters(), *host.named_buffers()])
        self._persistent = set(host.state_dict(keep_vars=True))
        by_name = {s.name: s for s in sites}
        halves: dict[bool, list[Block]] = {False: [], True: []}
        for step in emitted.steps:
            block = Block(step.block)
            halves[step.deep].append(block)
            for kind, name in step.owned:
                if kind in ("weight", "buffer"):
                    self._put(block, name)
                elif kind == "expert" and (site := name.rpartition(":")[0]) not in self.sites:
                    self.sites[site] = block.add_site(site, make_site(by_name[site], rank))
        self.shallow, self.deep = Segment(halves[False]), Segment(halves[True])
        for name in self._tensors:
            self._put(self.rest, name)
        del self._tensors
        names = canonical_names(host)
        self.aliases = {k: v for k, v in names.items() if k != v and k in self._persistent}

    def _put(self, block: Block, name: str) -> None:
        if name in self.refs:
            return
        tensor = self._tensors[name]
        block.weights.put(name, tensor, name in self._persistent)
        table = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        self.refs[name] = Ref(block.weights, table, name.replace(".", SEPARATOR))

    def bind(self, emitted: Emitted) -> tuple[tuple[Block, Bound], ...]:
        """Every step of a graph with the block that runs it and the places of its tensors."""
        blocks = {
            (b.name, deep): b
            for deep, half in ((False, self.shallow), (True, self.deep))
            for b in half
        }

        def place(kind: str, name: str) -> Any:
            if kind == "expert":
                site, _, part = name.rpartition(":")
                return (self.sites[site], self.sites[site].parts.index(part))
            return emitted.constants[name] if kind == "constant" else self.refs[name]

        return tuple(
            (blocks.get((s.block, s.deep), self.rest), Bound(s, tuple(place(*o) for o in s.owned)))
            for s in emitted.steps
        )

    def show_to(self, host: nn.Module) -> None:
        """Let the host hold these tensors as they are now (after a move or a cast)."""
        for name, first in canonical_names(host).items():
            parent, _, leaf = name.rpartition(".")
            module = host.get_submodule(parent)
            table: Any = module._parameters if leaf in module._parameters else module._buffers
            table[leaf] = self.refs[first].get()

    def unshare(self, name: str) -> None:
        """Give a tensor storage of its own, before it is written: the original must not change."""
        if name not in self.unshared:
            own = self.refs[name].get().detach().clone()
            weight = self.refs[name].table == "_parameters"
            self.refs[name].set(nn.Parameter(own) if weight else own)
            self.unshared.add(name)

    def unfreeze(self) -> None:
        """Make every dense weight that a graph runs trainable, but those that experts replace."""
        replaced = {w for s in self.sites.values() for w in s.replaced}
        unused = set(self.rest.weights.names())
        for name, ref in self.refs.items():
            runs = ref.table == "_parameters" and name not in replaced | unused
            if runs and ref.get().is_floating_point():
                self.unshare(name)

    def unshared_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that a forward pass may write to, by name."""
        names = [n for n in self.unshared if self.refs[n].table == "_buffers"]
        return {n: self.refs[n].get() for n in names}

    def unshare_written(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            for i in step.writes:
                if i < len(step.owned) and step.owned[i][0] == "buffer":
                    self.unshare(step.owned[i][1])

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """The persistent dense tensors that training may have changed, by name."""
        return {n: self.refs[n].get() for n in sorted(self.unshared & self._persistent)}


def public_name(key: str) -> str:
    """An internal state-dict key as users see it: the original's, or one under ``moe_rewrite.``."""
    for part, added in ((".weights.", ""), (".experts.", ADDED + "experts.")):
        if part in key:
            return added + key.split(part, 1)[1].replace(SEPARATOR, ".")
    return ADDED + key


def added_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that conversion added, under its public name."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if public_name(key).startswith(ADDED):
            yield public_name(key), tensor


def state_to_public(
    aliases: dict[str, str], state: OrderedDict[str, torch.Tensor], prefix: str
) -> None:
    """Rename a collected state dict in place, and add the tied names."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + public_name(key[len(prefix) :])] = state.pop(key)
    for alias, name in aliases.items():
        if prefix + name in state:
            state[prefix + alias] = state[prefix + name]


def state_to_private(
    model: nn.Module, aliases: dict[str, str], state: dict[str, torch.Tensor], prefix: str
) -> None:
    """Rename a state dict under public names in place, for load_state_dict."""
    keys = [k for k, _ in (*model.named_parameters(), *model.named_buffers())]
    private = {public_name(k): prefix + k for k in keys}
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name in aliases:
            state.pop(key)
        elif name in private:
            state[private[name]] = state.pop(key)
