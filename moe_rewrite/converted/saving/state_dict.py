"""State-dict names: the original's, and ``moe_rewrite.`` before what conversion added.

They are paths of modules that exist. A state dict also says which experts it holds, so that loading
it adds or removes experts first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...experts.base import ExpertParameters
from ...utils.module_tree import Holder, put_module
from ..expert_set import ExpertSet
from ..parameters import ParameterStore
from . import checkpoint

ADDED = "moe_rewrite."
FACTS = ADDED + "_extra_state"


class Added(Holder):
    """What conversion added: the router, the experts, and which they are."""

    def __init__(self, experts: ExpertSet) -> None:
        super().__init__()
        self._set = experts

    def get_extra_state(self) -> torch.Tensor:
        return to_tensor(self._set.facts())

    def set_extra_state(self, state: Any) -> None:
        """The model has read it: `StateDict._load_from_state_dict`."""


def added(experts: ExpertSet, sites: dict[str, ExpertParameters]) -> Added:
    """The module `moe_rewrite` of a converted model. sites: experts' modules by site."""
    made = Added(experts)
    put_module(made, "router", experts.router)
    for name, site in sites.items():
        put_module(made, f"experts.{name}", site)
    return made


def to_tensor(facts: dict[str, Any]) -> torch.Tensor:
    """As bytes in a tensor, since safetensors files hold nothing else; as many for the same experts
    whatever was trained since, since torch.distributed.checkpoint loads into tensors of one size."""
    longest: dict[str, Any] = {"frozen": facts["names"]}
    for name, value in facts.items():
        if isinstance(value, list) and set(map(type, value)) == {bool}:
            longest[name] = [False] * len(value)
        elif isinstance(value, bool):
            longest[name] = False
    text = json.dumps(facts).encode().ljust(len(json.dumps(facts | longest).encode()))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def of_tensor(state: torch.Tensor) -> dict[str, Any]:
    try:
        return json.loads(bytes(state.detach().cpu().tolist()))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{FACTS} of this state dict is malformed: {error}") from None


def added_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that conversion added, under its name."""
    router: Any = model.router
    router.close_sums()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith(ADDED):
            yield name, tensor


class StateDict(nn.Module):
    """The part of a converted model that tools read when they save and load it."""

    _store: ParameterStore
    _experts: ExpertSet
    reference: Any

    def _parts(self) -> dict[str, nn.Module]:
        parts = {name: vars(self).get(name) for name in ("shallow", "deep", "router")}
        store = vars(self).get("_store")
        parts["unused"] = None if store is None else store.rest
        return {name: part for name, part in parts.items() if part is not None}

    def children(self) -> Iterator[nn.Module]:
        """The parts that run, which hold every tensor, instead of the tree of names: tools that go
        from module to module (FSDP2) find a tensor in its block and nowhere else."""
        yield from self._parts().values()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The tree of names, then the blocks over its tensors."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, part in self._parts().items() if remove_duplicate else ():
            yield from part.named_modules(memo, f"{prefix}{'.' * bool(prefix)}{ADDED}{name}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._store.tie()
        for site in self._experts.sites:
            site.follow(fn)
        return self

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        """Have the experts that the state dict has, before the modules below are loaded."""
        dense = [*self._store.slots, *self._store.aliases]
        self._absent, self._loaded = {prefix + FACTS}, None
        if (facts := state.get(prefix + FACTS)) is not None:
            said = of_tensor(facts)
            of_experts = checkpoint.Facts.of("this state dict", said, None)
            if not any(prefix + name in state for name in dense):
                self._absent |= {prefix + name for name in dense}
                self._require_base(said)
            self._experts.become(of_experts)
            self._loaded = of_experts
        saved = set()
        for key in [k for k in state if k.startswith(prefix + checkpoint.DENSE)]:
            name = key[len(prefix) :].removeprefix(checkpoint.DENSE)
            self._store.copy_on_write(name)
            state[prefix + name] = state.pop(key)
            saved.add(prefix + name)
        for alias, name in self._store.aliases.items():
            if prefix + name in saved:  # own files hold a tied tensor once
                state[prefix + alias] = state[prefix + name]
        super()._load_from_state_dict(state, prefix, *rest)

    def _require_base(self, said: dict[str, Any]) -> None:
        base = said.get("base")
        if base is not None and base != checkpoint.base_key(
            checkpoint.fingerprint(self.reference.state)
        ):
            raise CheckpointError(
                "the saved experts belong to another base model: load the model that they were "
                "trained on, with the same weights, and convert that"
            )

    # -- names that are also those of methods ----------------------------------------------------

    def get_submodule(self, target: str) -> nn.Module:
        first, _, rest = target.partition(".")
        child = self._modules.get(first)
        return super().get_submodule(target) if child is None else child.get_submodule(rest)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint, which walks names by getattr: where to look for those
        of the original's modules that are also attributes of a converted model."""
        hidden = (n for n in self._modules if getattr(self, n, None) is not self._modules[n])
        return dict.fromkeys(hidden, "_named_children")

    @property
    def _named_children(self) -> Any:
        return Children(self._modules)


class Children:
    """Modules by name, as attributes."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.__dict__.update(modules)


def after_load_state_dict(model: Any, incompatible: Any) -> None:
    """A file with only what was added lacks the frozen tensors, and older state dicts do not say
    which experts they hold."""
    absent: set[str] = getattr(model, "_absent", set())
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in absent]
    if getattr(model, "_loaded", None) is not None:
        model.after_loading(model._loaded)
        model._loaded = None
