"""Traces of PyTorch that take less memory, and leave less of it taken.

PyTorch keeps what a trace has seen, graphs, shapes and source code, until the next one comes or for
ever: of a small model that is as much as its weights. All of it has names that may go; without them
nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

CACHE = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time
STACKS = "do_not_emit_stack_traces"  # the lines of source behind each node: nobody reads them
OFTEN = (200, 5, 1)  # the collector's thresholds: garbage that lies long keeps pages taken


@contextmanager
def collecting() -> Iterator[None]:
    """Garbage is collected soon, as what a trace leaves is: meanwhile the collector passes over all
    objects that there were before, for whose number it would come seldom. What is free before and
    afterwards is handed back to the system."""
    own = not gc.get_freeze_count()  # else the user froze some, which must stay so
    gc.collect()
    if own:
        gc.freeze()
        gc.collect()  # of nothing: by how much this leaves, the next one comes soon
    release_memory()
    usual = gc.get_threshold()
    gc.set_threshold(*(OFTEN if usual[0] else usual))  # 0: the user wants none
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()
        if own:
            gc.unfreeze()
        release_memory()


def release_memory() -> None:
    """Hand freed memory back to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def frugal_traces() -> Iterator[None]:
    """For torch.export and torch.onnx.export."""
    import torch._dynamo.config as dynamo
    from torch.fx import config as fx

    known = set(_sources())
    try:
        with _with(dynamo, CACHE, False), _with(fx, STACKS, True), _unprinted():
            yield
    except Exception as error:
        _forget_failed(error)
        raise
    finally:
        _forget(known)


@contextmanager
def _with(config: Any, name: str, value: bool) -> Iterator[None]:
    """A setting of PyTorch's, where there is one of this name."""
    had = getattr(config, name, None)
    if had is None:
        yield
        return
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, had)


@contextmanager
def _unprinted() -> Iterator[None]:
    """Of a trace that fails on a tensor's value PyTorch prints the whole graph, twice."""
    from torch.export import _trace

    vars(_trace)["print"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        vars(_trace).pop("print", None)


def forget_inputs(exported: Any) -> None:
    """Of torch.export's program, the inputs that the table of its sizes notes: each holds the table
    through C++, where Python's collector does not follow, and so all of the trace for ever."""
    for node in exported.graph.find_nodes(op="placeholder"):
        _forget_table(getattr(node.meta.get("val"), "fake_mode", None))


def _forget_failed(error: BaseException | None) -> None:
    """The same of a trace that raised this: its table is among what the error's frames hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, FakeTensorMode):
                    _forget_table(value)
        error = error.__cause__


def _forget_table(mode: Any) -> None:
    table = getattr(mode, "shape_env", None)
    if table is not None:
        table.tracked_fakes = None


def _sources() -> dict[str, str]:
    """The source code of all graph modules that there ever were."""
    from torch.fx import graph_module

    return getattr(getattr(graph_module, "_loader", None), "eval_cache", {})


def _forget(known: set[str]) -> None:
    from sympy.core.cache import clear_cache
    from torch._decomp import decompositions_for_rng
    from torch.fx.experimental import proxy_tensor, sym_node, symbolic_shapes

    clear_cache()  # of terms in the sizes' names
    tracker: Any = getattr(decompositions_for_rng, "PhiloxStateTracker", None)
    if hasattr(tracker, "reset"):  # it holds the last trace
        tracker.reset()
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    holders = (symbolic_shapes.ShapeEnv, symbolic_shapes)
    functions = [f for holder in holders for f in vars(holder).values()]
    for function in (*functions, *_enclosed(sym_node.SymNode)):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    sources = _sources()
    for name in sources.keys() - known:
        sources.pop(name, None)
        linecache.cache.pop(name, None)


def _enclosed(kind: type) -> Iterator[Any]:
    """The functions that the methods of a class were made of."""
    for method in filter(callable, vars(kind).values()):
        for cell in getattr(inspect.unwrap(method), "__closure__", None) or ():
            yield cell.cell_contents
