"""What traces of PyTorch leave behind, and how to convert and export in less memory.

PyTorch keeps what a trace has seen, graphs, shapes and source code, until the next one comes or for
ever: of a small model that is as much as its weights. By default only our own references to it are
dropped; `low_memory_export` clears the rest, which is the whole process's.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

FAKES = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time
STACKS = "do_not_emit_stack_traces"  # the lines of source behind each node: nobody reads them
OFTEN = (200, 5, 1)  # the collector's thresholds: garbage that lies long keeps pages taken
_low_memory: ContextVar[bool] = ContextVar("low_memory", default=False)


@contextmanager
def low_memory_export() -> Iterator[None]:
    """Conversions and exports in here take less memory at their peak, and leave less of it taken.

    While it lasts it changes what belongs to the whole process: Python collects garbage more often
    and passes over all objects that there were before; after each trace PyTorch's and sympy's
    caches are cleared, by private names where there are no others; freed memory is handed back to
    the system. For a process that converts or exports and does little else at that time.
    """
    with _frequent_collection():
        token = _low_memory.set(True)
        try:
            yield
        finally:
            _low_memory.reset(token)


@contextmanager
def _frequent_collection() -> Iterator[None]:
    """Of young objects: for the number of all of them the collector would come seldom."""
    own = not gc.get_freeze_count()  # else the user froze some, which must stay so
    gc.collect()
    if own:
        gc.freeze()
        gc.collect()  # of nothing: by how much this leaves, the next one comes soon
    _trim()
    usual = gc.get_threshold()
    gc.set_threshold(*(OFTEN if usual[0] else usual))  # 0: the user wants none
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()
        if own:
            gc.unfreeze()
        _trim()


def release_memory() -> None:
    """Within `low_memory_export`, hand freed memory back to the system."""
    if _low_memory.get():
        _trim()


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def tracing() -> Iterator[None]:
    """For torch.export and torch.onnx.export."""
    from torch.fx import config as fx

    frugal = _forgetting() if _low_memory.get() else nullcontext()
    try:
        with _with(fx, STACKS, True), frugal:
            yield
    except Exception as error:
        _forget_failed(error)
        raise


@contextmanager
def _forgetting() -> Iterator[None]:
    import torch._dynamo.config as dynamo

    known = set(_sources())
    try:
        with _with(dynamo, FAKES, False):
            yield
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
    """What PyTorch and sympy keep of a trace, but for the sources that were known before."""
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
