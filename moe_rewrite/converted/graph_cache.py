"""The graphs of a converted model: which one serves a call, and how it runs.

A graph is compiled on the first call of its signature (argument names, dtypes, ranks, constants)
and held against the dense model on the first call of each pattern of sizes that capture could
have taken for constants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import EquivalenceError, InputError
from ..frontend.capture import split_static
from ..ir.program import CACHE, Program, expression, value
from ..passes.emit import Emitted, narrowed
from ..passes.pipeline import Compiler
from ..routing.plan import RoutingPlan, align
from ..routing.token_gate import PrefixState
from ..utils.content_key import content_key
from .block_module import Block, Bound
from .parameters import Ownership
from .verify import compare

Planner = Callable[
    [torch.Tensor, torch.Tensor | None], tuple[RoutingPlan, PrefixState | None]
]  # features at the cut and their mask -> the plan, and the router's state after these rows


@dataclass
class Graph:
    """One compiled signature, bound to a model's blocks.

    names: traced arguments in order; leaves: value names of their tensors; static: (leaf, dim,
    size) that must hold; ties: dimensions that must agree; out_spec: of the outputs, a cache being
    one leaf; cache_at: the outputs that make up this cache. comparable: the dense model can be put
    in a mode in which it computes the same. frozen: the shallow part builds no autograd graph.
    checked: size patterns found equal to
    the dense model's result; refused: those found different. behind: the steps that run where the
    features at the cut are given, made when first asked for.
    """

    names: tuple[str, ...]
    leaves: tuple[str, ...]
    static: tuple[tuple[int, int, int], ...]
    ties: tuple[tuple[tuple[int, int], ...], ...]
    emitted: Emitted
    steps: tuple[tuple[Block, Bound], ...]
    out_spec: Any
    cache_at: tuple[int, int] | None
    mode: str
    frozen: bool
    comparable: bool
    checked: set = field(default_factory=set)
    refused: set = field(default_factory=set)
    behind: tuple[tuple[Block, Bound], ...] | None = None

    def __deepcopy__(self, memo: dict) -> Graph:
        """The copy runs the same code on the copied model's blocks."""
        steps = tuple(
            (copy.deepcopy(block, memo), Bound(bound.step, copy.deepcopy(bound.refs, memo)))
            for block, bound in self.steps
        )
        return replace(
            self, steps=steps, checked=set(self.checked), refused=set(self.refused), behind=None
        )

    def accepts(self, leaves: list[torch.Tensor]) -> bool:
        fits = all(leaves[i].shape[d] == size for i, d, size in self.static)
        return fits and small_sizes(leaves) not in self.refused

    def require_ties(self, leaves: list[torch.Tensor]) -> None:
        for group in self.ties:
            (i, d), *others = group
            for j, e in others:
                if leaves[i].shape[d] != leaves[j].shape[e]:
                    raise InputError(
                        f"{self.leaves[j]} has shape {tuple(leaves[j].shape)}: dimension {e} "
                        f"should be {leaves[i].shape[d]}, as dimension {d} of {self.leaves[i]}"
                    )

    def features(self, leaves: list[torch.Tensor]) -> torch.Tensor:
        """What the shallow part gives at the cut."""
        seen: list[torch.Tensor] = []

        def look(features: torch.Tensor, mask: Any) -> tuple[Any, None]:
            seen.append(features)
            return None, None

        self.plan(leaves, look)
        return seen[0]

    def plan(
        self, leaves: list[torch.Tensor], planner: Planner, features: torch.Tensor | None = None
    ) -> tuple[RoutingPlan, PrefixState | None]:
        """Run up to the cut, for the plan alone; with the features at hand, the router alone."""
        values = self._values(leaves)
        if features is not None:
            return planner(features, values[MASK])
        for block, bound in self.steps:
            if bound.step.deep:
                break
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                _advance(values, bound, block(bound, (), *_taken(values, bound)))
        return self._plan(values, planner)

    def run(
        self, leaves: list[torch.Tensor], planner: Planner, checkpoint: bool = False,
        features: torch.Tensor | None = None,
    ) -> tuple[list[Any], RoutingPlan, PrefixState | None]:  # fmt: skip
        """All outputs, the plan, and the router's state behind these positions.

        checkpoint: recompute deep blocks in the backward pass. features: what the shallow part
        gives at the cut, where that is known: what only serves to compute it does not run.
        """
        values = self._values(leaves)
        steps = self.steps if features is None else self._behind_cut()
        plan: RoutingPlan | None = None
        after = None
        for block, bound in steps:
            if bound.step.deep and plan is None:
                if features is not None:
                    values[self.emitted.cut] = features
                plan, after = self._plan(values, planner)
                for name, layout in self.emitted.layouts:
                    values[name] = align(plan, layout)
            taken = _taken(values, bound)
            run = block.checkpointed if checkpoint and bound.step.deep else block
            wanted = bound.step.deep or not self.frozen
            with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                _advance(values, bound, run(bound, plan.active if plan else (), *taken))
        outputs = [values[o] if isinstance(o, str) else o.value for o in self.emitted.outputs]
        assert plan is not None  # something deep follows every cut
        return outputs, plan, after

    def _behind_cut(self) -> tuple[tuple[Block, Bound], ...]:
        """The deep steps, and of the shallow ones what they need besides the features."""
        if self.behind is None:
            kept = []
            needed: set[str] = {o for o in self.emitted.outputs if isinstance(o, str)}
            for block, bound in reversed(self.steps):
                step = bound.step
                if not step.deep:
                    step = narrowed(step, needed - {self.emitted.cut})
                    bound = replace(bound, step=step)
                if step.deep or step.gives:
                    kept.append((block, bound))
                    needed |= set(step.takes)
            self.behind = tuple(kept[::-1])
        return self.behind

    def _values(self, leaves: list[torch.Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(self.leaves, leaves, strict=True))
        values[MASK] = values.get(self.emitted.mask) if self.emitted.mask else None
        return values

    def _plan(
        self, values: dict[str, Any], planner: Planner
    ) -> tuple[RoutingPlan, PrefixState | None]:
        return planner(values[self.emitted.cut], values[MASK])


MASK = "mask of the rows"  # no name of a graph: it holds a space


def _taken(values: dict[str, Any], bound: Bound) -> list[Any]:
    return [values[n] for n in bound.step.takes]


def _advance(values: dict[str, Any], bound: Bound, given: tuple) -> None:
    values.update(zip(bound.step.gives, given, strict=True))
    for name in bound.step.drops:
        values.pop(name, None)


def small_sizes(leaves: list[torch.Tensor]) -> tuple:
    """Which sizes are 0 or 1: those that a captured graph might have treated as constants."""
    return tuple(tuple(min(s, 2) for s in t.shape) for t in leaves)


class Graphs:
    """Every graph of one model. check: hold graphs against the dense model on first use, with the
    plan that `dense` makes."""

    def __init__(self, compiler: Compiler, owned: Ownership, check: bool, dense: Planner) -> None:
        self._compiler, self._owned, self._check, self._dense = compiler, owned, check, dense
        self._kept: dict[tuple, list[Graph]] = {}

    def get(
        self, arguments: dict[str, Any], leaves: list[torch.Tensor], training: bool, where: tuple
    ) -> Graph:
        """The graph that serves this call, compiled and checked where that is not done yet.

        where: device and dtype of the model, which a graph has baked in.
        """
        mode = "train" if training else "eval"
        pattern = small_sizes(leaves)
        kept = self._kept.setdefault(signature(arguments, mode, where), [])
        graph = next((g for g in kept if g.accepts(leaves)), None)
        if graph is None:
            static_ones = any(pattern in g.refused for g in kept)
            graph = self._compile(arguments, mode, where, static_ones)
        graph.require_ties(leaves)
        valued = where[0].type != "meta"  # which holds nothing to compare
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
    ) -> Graph:
        """Bind a compiled program to the blocks and keep it for calls of its signature."""
        traced, _ = split_static(arguments)
        nodes = program.leaves()
        static: list[tuple[int, int, int]] = []
        ties: dict[Any, list[tuple[int, int]]] = {}  # by the size's expression
        for i, node in enumerate(nodes):
            for d, size in enumerate(value(node).shape):
                if isinstance(size, int):
                    static.append((i, d, size))
                elif not node.name.startswith(CACHE):
                    ties.setdefault(expression(size), []).append((i, d))
        self._owned.unshare_written(emitted.steps)
        spec, at = _without_cache(program.out_spec)
        graph = Graph(
            tuple(traced), tuple(n.name for n in nodes), tuple(static),
            tuple(tuple(t) for t in ties.values() if len(t) > 1), emitted,
            self._owned.bind(emitted), spec, at, program.mode, self._compiler.recipe.freeze,
            not program.held,
        )  # fmt: skip
        self._kept.setdefault(signature(arguments, program.mode, where), []).append(graph)
        return graph

    def _compile(
        self, arguments: dict[str, Any], mode: str, where: tuple, static_ones: bool
    ) -> Graph:
        self._owned.show_to(self._compiler.host)
        program, emitted = self._compiler.compile(arguments, mode, static_ones)
        return self.adopt(arguments, program, emitted, where)

    @torch.no_grad()
    def _equals_dense(self, graph: Graph, arguments: dict[str, Any], leaves: list) -> bool:
        """Run both without experts, from the same random state; statistics stay as they were."""
        self._owned.show_to(self._compiler.host)
        buffers = self._owned.unshared_buffers()
        before = {n: b.clone() for n, b in buffers.items()}

        def restore() -> None:
            for name, buffer in buffers.items():
                buffer.copy_(before[name])

        devices = {t.device for t in leaves if t.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices), self._compiler.as_in(graph.mode):
                given = {k: _fresh(v) for k, v in arguments.items()}
                dense = pytree.tree_leaves(self._compiler.host(**given))
            restore()
            with torch.random.fork_rng(devices):
                ours, *_ = graph.run([t.clone() for t in leaves], self._dense)
        finally:
            restore()
        return compare(dense, ours, arguments.get(graph.emitted.mask or "")).equal


def signature(arguments: dict[str, Any], mode: str, where: tuple) -> tuple:
    """What a call has in common with those that one graph may serve: structure, dtypes and ranks
    of its tensors, contents of its constants. Raises InputError for a constant without content.
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
    """Of a tensor its dtype and rank, of a container what it holds."""
    if isinstance(given, torch.Tensor):
        return given.dtype, given.ndim
    if isinstance(given, dict):
        return type(given), tuple((k, _form(v)) for k, v in given.items())
    inside = given if isinstance(given, (list, tuple)) else pytree.tree_leaves(given)
    return type(given), tuple(map(_form, inside))


def _no_content(name: str) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        raise InputError(
            f"{name} holds a {type(value).__name__}, which cannot be told from another one by its "
            "content, so no graph could be kept for it: pass tensors, NumPy arrays, bools, numbers, "
            "strings, or lists, tuples and dicts of these"
        )

    return refuse


def _fresh(given: Any) -> Any:
    """A cache that the dense model may write into; other arguments as they are."""
    return given if isinstance(given, torch.Tensor) else copy.deepcopy(given)


def _without_cache(spec: Any) -> tuple[Any, tuple[int, int] | None]:
    """The output's structure with a cache as one leaf, and the leaves that the cache had."""
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
