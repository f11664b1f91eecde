"""The tensors of a key-value cache in a trace: those of equal sizes are one input of it.

To torch.export every input costs a symbol for each open size, and a proof that two of them are equal.
A cache has two tensors a layer, all of the same sizes: the trace is given the first, makes nodes that
stand for the others, and the graph has them as inputs afterwards, with the sizes of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ..arguments import is_cache

_library = torch.library.Library("moe_rewrite", "FRAGMENT")
_library.define("cache_leaf(str argument, int number) -> Tensor")
LEAF = torch.ops.moe_rewrite.cache_leaf.default
NEEDED = ("get_proxy_mode", "snapshot_fake", "track_tensor_tree")  # of PyTorch's private names


class CacheLeaves:
    """Of one trace. example: its arguments. passed: those that torch.export is given, where a list of
    tensors stands for a cache. names: of the arguments that are caches."""

    def __init__(self, example: dict[str, Any]) -> None:
        self.example = example
        known = all(hasattr(proxy_tensor, name) for name in NEEDED)
        self.names = [n for n, given in example.items() if known and _grows(given)]
        self.passed = dict(example)
        self._specs: dict[str, Any] = {}
        self._first: dict[str, list[int]] = {}
        for name in self.names:
            leaves, self._specs[name] = pytree.tree_flatten(example[name])
            first: dict[tuple, int] = {}
            self._first[name] = [first.setdefault(_form(t), i) for i, t in enumerate(leaves)]
            self.passed[name] = [leaves[i] for i in first.values()]

    def whole(self, passed: dict[str, Any]) -> dict[str, Any]:
        """In a trace: the arguments with their caches. passed: fakes of `passed`."""
        mode = proxy_tensor.get_proxy_mode() if self.names else None
        return passed | {
            name: pytree.tree_unflatten(self._leaves(name, passed[name], mode), self._specs[name])
            for name in self.names
        }

    def _leaves(self, name: str, given: list[torch.Tensor], mode: Any) -> list[torch.Tensor]:
        firsts = dict(zip(dict.fromkeys(self._first[name]), given, strict=True))
        with torch._C.DisableTorchFunction():
            return [
                firsts[i] if i == first else _stand_in(firsts[first], name, i, mode)
                for i, first in enumerate(self._first[name])
            ]

    def expand(self, graph: fx.Graph) -> list[str]:
        """In torch.export's graph, make placeholders for all leaves, in the order of the call;
        returns their names."""
        stand_ins = {n.args: n for n in graph.nodes if n.target is LEAF}
        given = {n.name: n for n in graph.find_nodes(op="placeholder")}
        return [leaf for n in self.names for leaf in self._placeholders(graph, n, given, stand_ins)]

    def _placeholders(
        self, graph: fx.Graph, name: str, given: dict[str, fx.Node], stand_ins: dict[Any, fx.Node]
    ) -> list[str]:
        """Those of one cache, in place of the placeholders and nodes that the trace has."""
        firsts = dict.fromkeys(self._first[name])
        traced = {i: given[f"{name}_{k}"] for k, i in enumerate(firsts)}
        last, made = next(reversed(traced.values())), []
        for i, first in enumerate(self._first[name]):
            old = traced.get(i, stand_ins.get((name, i)))
            with graph.inserting_after(last):
                last = graph.placeholder(f"{name}_{i}")
            last.meta = {"val": (old or traced[first]).meta["val"]}
            made.append((last, old))
        for leaf, old in made:
            if old is not None:  # a cache may hold a tensor that the model does not read
                old.replace_all_uses_with(leaf)
                graph.erase_node(old)
        for i, (leaf, _) in enumerate(made):
            leaf.name = f"{name}_{i}"
        return [leaf.name for leaf, _ in made]


def _grows(given: Any) -> bool:
    """Whether it is a cache whose tensors are replaced, not written to: keys and values alone."""
    return is_cache(given) and all(
        isinstance(t, torch.Tensor) and t.ndim == 4 for t in pytree.tree_leaves(given)
    )


def _form(leaf: torch.Tensor) -> tuple:
    return type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad


def _stand_in(first: Any, name: str, number: int, mode: Any) -> torch.Tensor:
    fresh: Any = proxy_tensor.snapshot_fake(first)
    if mode is None:
        return fresh
    proxy = mode.tracer.create_proxy("call_function", LEAF, (name, number), {})
    return proxy_tensor.track_tensor_tree(fresh, proxy, constant=None, tracer=mode.tracer)
