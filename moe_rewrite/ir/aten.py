"""Questions to the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
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


def argument(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name in the schema; the default where it is left out."""
    place, default = _arguments(node.target)[name]
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


@cache
def _arguments(target: Any) -> dict[str, tuple[int, Any]]:
    formal = target._schema.arguments
    return {a.name: (i, a.default_value) for i, a in enumerate(formal)}


def expression(size: Any) -> Any:
    """What an open size, or what is computed of such, is of the sizes of the call; all else as it
    is."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return size.node.expr if symbolic else size


def op_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload: ``aten.linear.default`` -> ``linear``."""
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to in place."""
    writes = getattr(node.target, "writes", None)  # a call of this package's own
    if writes is not None:
        return writes(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        # batch_norm in training writes its statistics, though its schema does not say so
        if node.target is torch.ops.aten.batch_norm.default and node.args[5:6] == (True,):
            return [a for a in node.args[3:5] if isinstance(a, fx.Node)]
        return []
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, fx.Node):
            written.append(given)
    return written


def alias_root(node: fx.Node) -> fx.Node:
    """Follow views and in-place results back to the node whose storage this one shows."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        returns: Any = schema.returns if schema is not None else ()
        if len(returns) != 1 or returns[0].alias_info is None or not node.args:
            return node
        if not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]
    return node
