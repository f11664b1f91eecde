"""Ints that are inputs of a graph, in code that asks whether they are ints."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def taken_for_ints(module: nn.Module, example: Iterable[Any]) -> Iterator[None]:
    """In this context, ``isinstance(n, int)`` in the code of these modules' classes is true of a
    traced int too, as of the int that a call brings (``slice(-n, None) if isinstance(n, int) else
    n``). Nothing is changed for examples without ints."""
    spaces = _globals_of(module) if any(type(value) is int for value in example) else []
    original = builtins.isinstance

    def asked(value: Any, kinds: Any) -> bool:
        traced = type(value) is torch.SymInt and (kinds is int or kinds == (int,))
        return traced or original(value, kinds)

    for space in spaces:
        space["isinstance"] = asked
    try:
        yield
    finally:
        for space in spaces:
            del space["isinstance"]


def _globals_of(module: nn.Module) -> list[dict[str, Any]]:
    """Of the files that define the classes of these modules, but for PyTorch's own and those with
    an isinstance of their own."""
    names = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    found = (vars(sys.modules[n]) for n in sorted(names) if n in sys.modules)
    own = (space for space in found if space.get("__name__", "").partition(".")[0] != "torch")
    return [
        space for space in own if space.get("__name__") != "builtins" and "isinstance" not in space
    ]
