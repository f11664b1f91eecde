"""The graphs of a converted model: which one serves a call, and how it runs.

A graph is compiled on the first call of its signature (argument names, dtypes, ranks, constants)
and compared with the dense model on the first call of each pattern of sizes 0 and 1, which capture
could have taken for constants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import EquivalenceError, InputError
from ..frontend.arguments import split_static
from ..ir.aten import expression, value
from ..ir.equivalence import compare
from ..ir.program import Program
from ..ir.steps import Emitted
from ..passes.modes import modules_in_mode
from ..passes.pipeline import Compiler
from ..routing.plan import Planner
from ..utils.content_key import content_key
from .bound_graph import BoundGraph, small_sizes
from .parameters import ParameterStore


class GraphCache:
    """Every graph of one model.

    check: compare each graph with the dense model on first use.
    dense: makes the plan for that comparison.
    """

    def __init__(
        self, compiler: Compiler, store: ParameterStore, check: bool, dense: Planner
    ) -> None:
        self._compiler, self._store, self._check, self._dense = compiler, store, check, dense
        self._kept: dict[tuple, list[BoundGraph]] = {}
        self._caches: tuple[Any, Any] = None, None

    def get(
        self, arguments: dict[str, Any], leaves: list[torch.Tensor], training: bool, where: tuple
    ) -> BoundGraph:
        """The graph that serves this call; compiled and checked first if it is new.

        where: device and dtype of the model, which are constants of a graph.
        """
        mode = "train" if training else "eval"
        pattern = small_sizes(leaves)
        kept = self._kept.setdefault(signature(arguments, mode, where), [])
        graph = next((g for g in kept if g.accepts(leaves)), None)
        if graph is None:
            static_ones = any(pattern in g.refused for g in kept)
            graph = self._compile(arguments, mode, where, static_ones)
        graph.require_ties(leaves)
        valued = where[0].type != "meta"  # meta tensors have no values to compare
        if self._check and valued and graph.comparable and pattern not in graph.checked:
            if not self._equals_dense(graph, arguments, leaves):
                graph.refused.add(pattern)
                graph = self._compile(arguments, mode, where, static_ones=True)
                if not self._equals_dense(graph, arguments, leaves):
                    graph.refused.add(pattern)
                    raise EquivalenceError(
                        f"the graph captured for {sorted(arguments)} in {mode} mode differs from "
                        "the original on these inputs: please report this model, or convert with "
                        "verify=False"
                    )
            graph.checked.add(pattern)
        return graph

    def adopt(
        self, arguments: dict[str, Any], program: Program, emitted: Emitted, where: tuple
    ) -> BoundGraph:
        """Bind a compiled program to the blocks and keep it for calls of its signature."""
        traced, _ = split_static(arguments)
        nodes = program.leaves()
        static: list[tuple[int, int, int]] = []
        ties: dict[Any, list[tuple[int, int]]] = {}  # by the size's expression
        for i, node in enumerate(nodes):
            for d, size in enumerate(value(node).shape):
                if isinstance(size, int):
                    static.append((i, d, size))
                elif program.inputs[node.name].kind != "cache":
                    ties.setdefault(expression(size), []).append((i, d))
        self._store.copy_written(emitted.steps)
        spec, at = _without_cache(program.out_spec)
        graph = BoundGraph(
            tuple(traced), tuple(n.name for n in nodes), tuple(static),
            tuple(tuple(t) for t in ties.values() if len(t) > 1), emitted,
            self._store.bind(emitted), spec, at, program.mode, self._compiler.recipe.freeze,
            not program.shallow_reruns,
        )  # fmt: skip
        self._kept.setdefault(signature(arguments, program.mode, where), []).append(graph)
        return graph

    def cache_format(self, where: tuple) -> Any:
        """The CacheFormat for a device and dtype."""
        if self._caches[0] != where:
            self._store.load_into(self._compiler.host.module)
            with self._in_mode("eval"):
                self._caches = where, self._compiler.host.cache_format()
        return self._caches[1]

    def _compile(
        self, arguments: dict[str, Any], mode: str, where: tuple, static_ones: bool
    ) -> BoundGraph:
        self._store.load_into(self._compiler.host.module)
        program, emitted = self._compiler.compile(arguments, mode, static_ones)
        return self.adopt(arguments, program, emitted, where)

    def _in_mode(self, mode: str) -> Any:
        of = self._compiler
        return modules_in_mode(of.host, mode, of.recipe, of.decisions)

    @torch.no_grad()
    def _equals_dense(self, graph: BoundGraph, arguments: dict[str, Any], leaves: list) -> bool:
        """Run both without experts from the same random state; batch statistics are restored."""
        self._store.load_into(self._compiler.host.module)
        buffers = self._store.copied_buffers()
        before = {n: b.clone() for n, b in buffers.items()}

        def restore() -> None:
            for name, buffer in buffers.items():
                buffer.copy_(before[name])

        devices = {t.device for t in leaves if t.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices), self._in_mode(graph.mode):
                given = {k: _fresh(v) for k, v in arguments.items()}
                dense = pytree.tree_leaves(self._compiler.host.module(**given))
            restore()
            with torch.random.fork_rng(devices):
                ours, *_ = graph.run([t.clone() for t in leaves], self._dense)
        finally:
            restore()
        mask = arguments.get(graph.emitted.mask or "")
        return compare(dense, ours, mask, graph.emitted.numerics).equal


def signature(arguments: dict[str, Any], mode: str, where: tuple) -> tuple:
    """Key of the calls that one graph may serve: structure, dtypes and ranks of the tensors, values
    of the constants. Raises InputError for a constant that cannot be compared by value.
    """
    of_tensors: list[tuple] = []
    of_constants: list[tuple] = []
    for name, given in arguments.items():
        if any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(given)):
            of_tensors.append((name, _form(given)))
        else:
            of_constants.append((name, content_key(given, _no_content(name))))
    return mode, where, tuple(of_tensors), frozenset(of_constants)


def _form(given: Any) -> tuple:
    """(dtype, rank) of a tensor; of a container, its type and those of its elements."""
    if isinstance(given, torch.Tensor):
        return given.dtype, given.ndim
    if isinstance(given, dict):
        return type(given), tuple((k, _form(v)) for k, v in given.items())
    inside = given if isinstance(given, (list, tuple)) else pytree.tree_leaves(given)
    return type(given), tuple(map(_form, inside))


def _no_content(name: str) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        raise InputError(
            f"{name} holds a {type(value).__name__}, which cannot be distinguished from another by "
            "its content, so no graph could be kept for it: pass tensors, NumPy arrays, bools, "
            "numbers, strings, or lists, tuples and dicts of these"
        )

    return refuse


def _fresh(given: Any) -> Any:
    """A copy of a cache, since the dense model may write into it; tensors as they are."""
    return given if isinstance(given, torch.Tensor) else copy.deepcopy(given)


def _without_cache(spec: Any) -> tuple[Any, tuple[int, int] | None]:
    """The output's pytree with a cache as one leaf, and the cache's (start, stop) among leaves."""
    at: list[tuple[int, int]] = []

    def walk(spec: Any, start: int) -> Any:
        if spec.is_leaf():
            return spec
        if getattr(spec.type, "__name__", "") == "DynamicCache":
            at.append((start, start + spec.num_leaves))
            return pytree.treespec_leaf()
        children = []
        for child in spec.children():
            children.append(walk(child, start))
            start += child.num_leaves
        return pytree.TreeSpec(spec.type, spec.context, children)

    return walk(spec, 0), (at[0] if at else None)
