"""The graphs of a converted model: which one serves a call, and how it runs.

A graph is compiled on the first call of its signature (argument names, dtypes, ranks, constants)
and compared with the dense model on the first call of each pattern of sizes 0 and 1, which capture
could have taken for constants.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...errors import CaptureError, EquivalenceError, InputError, MoeRewriteError
from ...frontend.arguments import split_static
from ...frontend.capture import TRACING, Sizes
from ...ir.conditions import Conditions, conditions_of
from ...ir.equivalence import compare
from ...ir.program import Program
from ...ir.steps import Emitted
from ...passes.pipeline import Compiler
from ...routing.plan import Planner
from ...utils.rare_collections import rare_collections
from ...utils.sharded import is_traced
from ..dense_reference import DenseReference, fresh
from ..parameters import ParameterStore
from .bound_graph import BoundGraph
from .call import Call
from .call_facts import ChangingInts, ConfigStates

LIMIT = 64  # graphs of one model; the least recently used is dropped


class GraphCache:
    """Every graph of one model; calls may come from many threads at once.

    check: compare each graph with the dense model on first use.
    dense: makes the plan for that comparison.
    """

    def __init__(
        self, compiler: Compiler, store: ParameterStore, reference: DenseReference, check: bool,
        dense: Planner,
    ) -> None:  # fmt: skip
        self._compiler, self._store, self._check, self._dense = compiler, store, check, dense
        self._reference = reference
        self._kept: dict[tuple, list[BoundGraph]] = {}
        self._caches: tuple[Any, Any] = None, None
        self._configs = ConfigStates(compiler.host.config)
        self._ints = ChangingInts()
        self._uses = 0

    def get(
        self, arguments: dict[str, Any], training: bool, where: tuple
    ) -> tuple[BoundGraph, list[Any]]:
        """The graph that serves this call, and the leaves that it takes; compiled and checked first
        if it is new.

        where: device and dtype of the model, which are constants of a graph. Raises InputError for
        a call whose conditions no graph meets.
        """
        call = self._call(arguments, "train" if training else "eval", where)
        graph = self._allowed(call)
        if graph is None and any(map(is_traced, call.leaves)):
            raise InputError(_not_in_a_trace(f"graph for {sorted(arguments)} in {call.mode} mode"))
        if graph is None:
            try:
                with TRACING, rare_collections():  # another thread may have made it by now
                    graph = self._allowed(call) or self._prepared(call)
            except (CaptureError, EquivalenceError):
                if not call.ints:
                    raise
                self._ints.keep_constant(call.ints)  # code may ask whether it is an int
                self._kept.pop(call.key, None)
                return self.get(arguments, training, where)
        self._uses += 1
        graph.last_use = self._uses
        return graph, call.leaves

    def adopt(
        self, arguments: dict[str, Any], program: Program, emitted: Emitted, where: tuple
    ) -> BoundGraph:
        """Bind a compiled program to the blocks and keep it for calls of its signature."""
        call = self._call(arguments, program.mode, where)
        return self._bound(call, program, emitted)

    def clear(self) -> None:
        """Forget every graph, and the format of caches: the host has changed."""
        self._kept, self._caches = {}, (None, None)

    def cache_format(self, where: tuple) -> Any:
        """The CacheFormat for a device and dtype."""
        kept, made = self._caches
        if kept != where:
            if torch.compiler.is_exporting():
                raise InputError(_not_in_a_trace("key-value cache"))
            with TRACING, rare_collections():
                self._store.load_into(self._compiler.host.module)
                made = self._compiler.host.cache_format()
                self._caches = where, made
        return made

    def _call(self, arguments: dict[str, Any], mode: str, where: tuple) -> Call:
        where = (*where, self._configs.current())
        return Call.of(arguments, mode, where, self._ints.among(arguments))

    def _allowed(self, call: Call) -> BoundGraph | None:
        kept = self._kept.get(call.key, ())
        return next((g for g in kept if g.conditions.pattern(call.leaves) in g.allowed), None)

    def _prepared(self, call: Call) -> BoundGraph:
        """A graph whose conditions the call meets, allowed for its pattern of small sizes."""
        kept = [(g, g.conditions.pattern(call.leaves)) for g in self._kept.get(call.key, ())]
        met = [(g, p) for g, p in kept if p is not None]
        graph = next((g for g, p in met if p not in g.refused), None)
        if graph is None:
            graph = self._compiled(call, ("ones", "own") if met else ("general", "ones", "own"))
        if not self._allow(graph, call):
            if graph.copied and self._compiler.copy_blocks:
                if call.ints:  # more likely the ints, which are constants then
                    raise EquivalenceError("the graph differs where ints are its inputs")
                self._compiler.trace_all_blocks()
                self._kept.pop(call.key)
                return self._prepared(call)
            graph = self._compiled(call, ("ones", "own"))
            if not self._allow(graph, call):
                raise EquivalenceError(
                    f"the graph captured for {sorted(call.arguments)} in {call.mode} mode differs "
                    "from the original on these inputs: please report this model, or convert with "
                    "verify=False"
                )
        return graph

    def _compiled(self, call: Call, tries: tuple[Sizes, ...]) -> BoundGraph:
        """A new graph whose conditions the call meets. Raises InputError or CaptureError."""
        tried = [g.conditions for g in self._kept.get(call.key, ())]
        error: CaptureError | None = None
        for sizes in tries:
            self._store.load_into(self._compiler.host.module)
            compile = self._compiler.compile
            try:
                with torch.inference_mode(False):  # its constants serve training too
                    program, emitted = compile(call.arguments, call.mode, sizes, call.ints)
            except CaptureError as raised:
                error = error or raised
                if not tried:
                    raise
                continue
            tried.append(_conditions(program))
            if tried[-1].pattern(call.leaves) is not None:
                return self._bound(call, program, emitted)
        unmet = (conditions.violated(call.leaves) for conditions in tried)
        reason = next((text for text in unmet if text), error)
        raise InputError(f"no graph can be captured for this call: {reason}") from error

    def _bound(self, call: Call, program: Program, emitted: Emitted) -> BoundGraph:
        self._store.copy_written(emitted.steps)
        spec, at = _without_cache(program.out_spec)
        traced, _ = split_static(call.arguments, call.ints)
        graph = BoundGraph(
            tuple(traced), _conditions(program), emitted, self._store.bind(emitted), spec, at,
            program.mode, self._compiler.recipe.freeze, self._store.off_device,
            not program.shallow_reruns, self._uses + 1, copied=program.copied,
        )  # fmt: skip
        self._kept.setdefault(call.key, []).append(graph)
        self._drop_least_used()
        return graph

    def _drop_least_used(self) -> None:
        graphs = [(g.last_use, key, g) for key, kept in self._kept.items() for g in kept]
        if len(graphs) > LIMIT:
            _, key, oldest = min(graphs, key=lambda entry: entry[0])
            self._kept[key] = [g for g in self._kept[key] if g is not oldest]

    def _allow(self, graph: BoundGraph, call: Call) -> bool:
        """Whether the graph may serve this call's pattern of small sizes: where it can be compared
        with the dense model, if it is equal; else if no open size is 0 or 1, which capture assumes.
        """
        pattern = graph.conditions.pattern(call.leaves)
        assert pattern is not None
        of_its_kind = all(size == 2 for size in pattern)
        runs = self._store.parallel is not None or not self._store.sharded  # the dense model does
        if self._check and graph.comparable and call.device != "meta" and runs:
            try:
                equal = self._equals_dense(graph, call.arguments, call.leaves)
            except RuntimeError as error:  # an operation that does not take a size of 0 or 1
                if of_its_kind or isinstance(error, MoeRewriteError):
                    raise
                equal = False
        else:
            equal = of_its_kind and not call.ints
        (graph.allowed if equal else graph.refused).add(pattern)
        return equal

    @torch.no_grad()
    def _equals_dense(self, graph: BoundGraph, arguments: dict[str, Any], leaves: list) -> bool:
        """Run both without experts from the same random state."""
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        with torch.random.fork_rng(devices), self._standing_in(arguments):
            dense = self._reference.outputs(arguments, graph.mode)
        with (
            torch.random.fork_rng(devices), self._standing_in(arguments),
            self._reference.restoring(),
        ):  # fmt: skip
            ours, *_ = graph.run([fresh(t) for t in leaves], self._dense)
        mask = arguments.get(graph.emitted.mask or "")
        emitted = graph.emitted
        return compare(dense, ours, mask, emitted.numerics, emitted.computed).equal

    def _standing_in(self, arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """The context in which a comparison changes no cache of the caller's."""
        _, caches = self._caches
        return nullcontext() if caches is None else caches.standing_in(arguments)


def _not_in_a_trace(what: str) -> str:
    return (
        f"torch.export traces a converted model that has no {what} yet, and none can be made within a "
        "trace: call the model once on such inputs (sizes of the same kind: 0, 1 or more), then export"
    )


def _conditions(program: Program) -> Conditions:
    leaves = program.leaves("user", "cache", "int")
    return conditions_of(leaves, program.relations, program.values)


def _without_cache(spec: Any) -> tuple[Any, tuple[int, int] | None]:
    """The output's pytree with a cache as one leaf, and the cache's (start, stop) among leaves."""
    at: list[tuple[int, int]] = []

    def walk(spec: Any, start: int) -> Any:
        if spec.is_leaf():
            return spec
        if getattr(spec.type, "__name__", "") in ("DynamicCache", "TracedCache", "OpaqueCache"):
            at.append((start, start + spec.num_leaves))
            return pytree.treespec_leaf()
        children = []
        for child in spec.children():
            children.append(walk(child, start))
            start += child.num_leaves
        return pytree.TreeSpec(spec.type, spec.context, children)

    return walk(spec, 0), (at[0] if at else None)
