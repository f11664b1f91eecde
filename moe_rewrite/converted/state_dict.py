"""State-dict names: the original's, and ``moe_rewrite.`` before what conversion added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .block_module import SEPARATOR

ADDED = "moe_rewrite."


def use_public_names(module: nn.Module) -> None:
    """Make `state_dict` and `load_state_dict` of a converted model use public names.

    The module has `aliases`: tied name -> name of the tensor that it shares.
    """
    module._register_state_dict_hook(_to_public)
    module.register_load_state_dict_pre_hook(_to_private)


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


def _to_public(module: Any, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    """Rename a collected state dict in place, and add the tied names."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + public_name(key[len(prefix) :])] = state.pop(key)
    for alias, name in module.aliases.items():
        if prefix + name in state:
            state[prefix + alias] = state[prefix + name]


def _to_private(module: Any, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    """Rename a state dict under public names in place, for load_state_dict."""
    keys = [k for k, _ in (*module.named_parameters(), *module.named_buffers())]
    private = {public_name(k): prefix + k for k in keys}
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name in module.aliases:
            state.pop(key)
        elif name in private:
            state[private[name]] = state.pop(key)
