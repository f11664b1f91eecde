"""Modules that only hold tensors and other modules, at dotted paths."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import InputError


class Holder(nn.Module):
    """A node of a tree of names: `tree.model.embed.weight` is a tensor. It computes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(
            "this module of a converted model only holds tensors under the original's names: call "
            "the whole model, or to_dense() for the original's modules"
        )


def node_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below `root`; Holders are made where there is none yet.

    Entries are read and written in `_modules`, since a name may also be that of a method.
    """
    node = root
    for part in filter(None, path.split(".")):
        if part not in node._modules:
            node._modules[part] = Holder()
        node = node._modules[part]  # type: ignore[assignment]
    return node


def put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path. If something is there already, such as Holders of longer paths, what
    both hold stays, under the module's own names with an underscore added where they collide."""
    parent, _, leaf = path.rpartition(".")
    table = node_at(root, parent)._modules
    there = table.get(leaf)
    if there is None or type(there) is Holder and not there._modules.keys() & vars_of(module):
        for name, child in (there._modules if there is not None else {}).items():
            module._modules[name] = child
        table[leaf] = module
        return
    while leaf in table:
        leaf += "_"
    table[leaf] = module


def vars_of(module: nn.Module) -> set[str]:
    """Names of what a module holds."""
    return {*module._modules, *module._parameters, *module._buffers}


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> str:
    """Put a parameter or buffer into a module; returns the name of the table that holds it."""
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
        return "_parameters"
    module._buffers[name] = tensor
    if not persistent:
        module._non_persistent_buffers_set.add(name)
    return "_buffers"
