"""Queries on the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx


def reach(node: fx.Node, steps: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """This node and all that are reachable by `steps`: from a node to its users, or its inputs."""
    seen, stack = {node}, [node]
    while stack:
        fresh = [n for n in steps(stack.pop()) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def module_paths(node: fx.Node) -> list[tuple[str, str]]:
    """(dotted path, class name) of the modules that contain a node, outermost first, without the
    root. torch.export writes the second call of a shared module as ``path@1``: the same module.
    """
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(str(path).split("@")[0], str(kind)) for path, kind in stack.values()]
    return [(p, k) for p, k in entries if p and not p.startswith("_empty_nn_module_stack")]


def identifier(name: str) -> str:
    """A dotted name as an identifier, to be part of a node's name."""
    return "".join(c if c.isalnum() else "_" for c in name)


def value(node: Any) -> Any:
    """The fake value of a node (its ``meta["val"]``); None if capture recorded none."""
    return node.meta.get("val")


def expression(size: Any) -> Any:
    """The sympy expression of a symbolic size; anything else unchanged."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return size.node.expr if symbolic else size
