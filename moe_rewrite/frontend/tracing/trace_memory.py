"""Memory that PyTorch keeps after a trace, and a mode to convert and export in less memory.

PyTorch keeps a trace's graphs, shapes and source code until the next trace, or forever: for a small
model as much as its weights. By default only our own references are dropped; `low_memory_export`
clears the rest too, which belongs to the whole process.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import linecache
import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

FAKES = "fake_tensor_cache_enabled"  # with symbolic sizes, a key costs more than the result
STACKS = "do_not_emit_stack_traces"  # the stack trace of each node, which nothing here reads
NOTED = "_extract_tensor_metadata"  # once more what a node's value says, at the price of a proof
OFTEN = (200, 5, 1)  # gc thresholds: garbage that stays for long keeps its memory pages in use
_low_memory: ContextVar[bool] = ContextVar("low_memory", default=False)


@contextmanager
def low_memory_export() -> Iterator[None]:
    """Convert and export with a lower peak of memory, and with less memory in use afterwards.

    Inside this context the whole process is affected: Python collects garbage more often, and skips
    objects that existed before; after each trace the caches of PyTorch and sympy are cleared,
    through private names where there are no public ones; freed memory is returned to the system.
    Meant for a process that does little else at that time.
    """
    with _frequent_collection():
        token = _low_memory.set(True)
        try:
            yield
        finally:
            _low_memory.reset(token)


@contextmanager
def _frequent_collection() -> Iterator[None]:
    """Collect garbage often: with older objects counted in, full collections would be rare."""
    own = not gc.get_freeze_count()  # else the user froze some, which must stay so
    gc.collect()
    if own:
        gc.freeze()
        gc.collect()  # resets the count of long-lived objects, by which Python delays the next
    _trim()
    usual = gc.get_threshold()
    gc.set_threshold(*(OFTEN if usual[0] else usual))  # 0: the user turned gc off
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()
        if own:
            gc.unfreeze()
        _trim()


def release_memory() -> None:
    """Within `low_memory_export`, return freed memory to the system."""
    if _low_memory.get():
        _trim()


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def tracing() -> Iterator[None]:
    """The context for torch.export and torch.onnx.export, which drops what they keep of a trace."""
    import torch._dynamo.config as dynamo
    from torch.fx import config as fx
    from torch.fx.experimental import proxy_tensor

    frugal = _forgetting() if _low_memory.get() else nullcontext()
    try:
        with (
            replaced(fx, STACKS, True), replaced(dynamo, FAKES, False),
            replaced(proxy_tensor, NOTED, _elsewhere(getattr(proxy_tensor, NOTED, None))), frugal,
        ):  # fmt: skip
            yield
    except Exception as error:
        _forget_failed(error)
        raise


@contextmanager
def _forgetting() -> Iterator[None]:
    known = set(_sources())
    try:
        yield
    finally:
        _forget(known)


@contextmanager
def replaced(config: Any, name: str, value: Any) -> Iterator[None]:
    """Set an option or a function of PyTorch for a while; nothing if this version has none such."""
    had = getattr(config, name, None)
    if had is None:
        yield
        return
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, had)


def _elsewhere(function: Any) -> Any:
    """A function of PyTorch as other threads know it; None is what it returns in this one."""
    here = threading.get_ident()
    return lambda *args: None if threading.get_ident() == here else function(*args)


def lazy_modules() -> AbstractContextManager[None]:
    """In this context, graph modules write their Python code when it is called, which is never in a
    trace; nothing if this version has no such option."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return nullcontext()
    return _use_lazy_graph_module(True)


def forget_inputs(exported: Any) -> None:
    """Drop the fake inputs that an exported program's ShapeEnv keeps. They refer back to it through
    C++, where Python's collector cannot follow: the trace would never be freed."""
    for node in exported.graph.find_nodes(op="placeholder"):
        _forget_table(getattr(node.meta.get("val"), "fake_mode", None))


def _forget_failed(error: BaseException | None) -> None:
    """The same for a failed trace, whose ShapeEnv the frames of the error's traceback hold."""
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
    """The source code of every graph module made in this process."""
    from torch.fx import graph_module

    return getattr(getattr(graph_module, "_loader", None), "eval_cache", {})


def _forget(known: set[str]) -> None:
    """Clear what PyTorch and sympy keep of a trace, except the sources that were known before."""
    from sympy.core.cache import clear_cache
    from torch._decomp import decompositions_for_rng
    from torch.fx.experimental import proxy_tensor, sym_node, symbolic_shapes

    clear_cache()  # sympy's expressions of symbolic sizes
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
    """The functions in the closures of a class's methods."""
    for method in filter(callable, vars(kind).values()):
        for cell in getattr(inspect.unwrap(method), "__closure__", None) or ():
            yield cell.cell_contents
