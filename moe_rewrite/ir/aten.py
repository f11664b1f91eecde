"""Questions to the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx


def reach(node: fx.Node, steps: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """This node and every one that repeated steps lead to: its users, or its inputs."""
    seen, stack = {node}, [node]
    while stack:
        fresh = [n for n in steps(stack.pop()) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def module_paths(node: fx.Node) -> list[tuple[str, str]]:
    """(dotted path, class name) of the modules around a node, outermost first, the root left out.

    torch.export writes the second call of a shared module as ``path@1``: that is the same module.
    """
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(str(path).split("@")[0], str(kind)) for path, kind in stack.values()]
    return [(p, k) for p, k in entries if p and not p.startswith("_empty_nn_module_stack")]


def identifier(name: str) -> str:
    """A dotted name as part of a node's name."""
    return "".join(c if c.isalnum() else "_" for c in name)


def value(node: Any) -> Any:
    """The fake value of a node, which another takes as an argument (None: capture recorded none)."""
    return node.meta.get("val")


def expression(size: Any) -> Any:
    """What an open size, or what is computed of such, is of the sizes of the call; all else as it
    is."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return size.node.expr if symbolic else size
