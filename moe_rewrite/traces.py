"""Traces of PyTorch that take less memory, and leave less of it taken.

PyTorch makes a node of every computation with sizes that its checks do, or remembers how to make
it, and keeps what a trace has seen, graphs, shapes and source code, until the next one comes or for
ever: of a small model that is as much as its weights. All of it has names that may go; without them
nothing is done.
"""

from __future__ import annotations

import gc
import importlib
import linecache
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

CACHE = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time
EAGER = "maybe_disable_thunkify"  # around the model's own code
SIZES = "_SymNodeDict"  # of a trace: what gives each size
COMPUTED = "_compute_proxy"  # what gives it where it is computed from others


@contextmanager
def collecting() -> Iterator[None]:
    """Garbage is collected soon, as what a trace leaves is: meanwhile the collector passes over all
    objects that there were before, for whose number it would come seldom."""
    own = not gc.get_freeze_count()  # else the user froze some, which must stay so
    gc.collect()
    if own:
        gc.freeze()
        gc.collect()  # of nothing: by how much this leaves, the next one comes soon
    try:
        yield
    finally:
        gc.collect()
        if own:
            gc.unfreeze()


@contextmanager
def frugal_traces(lazy_sizes: bool = False) -> Iterator[None]:
    """For torch.export and torch.onnx.export. lazy_sizes: a computation with sizes becomes a node
    where one needs it; RecursionError where hundreds of them need one another."""
    import torch._dynamo.config as config

    context: Any = config.patch(CACHE, False) if hasattr(config, CACHE) else nullcontext()  # type: ignore[attr-defined]
    known = set(_sources())
    try:
        with context, _lazy() if lazy_sizes else nullcontext():
            yield
    finally:
        _forget(known)


@contextmanager
def _lazy() -> Iterator[None]:
    swapped = []
    for module_name, name, stand_in in (
        ("torch._functorch._aot_autograd.graph_capture_wrappers", EAGER, nullcontext),
        ("torch.fx.experimental.proxy_tensor", SIZES, _Sizes),
    ):
        with suppress(ImportError, AttributeError):
            module: Any = importlib.import_module(module_name)
            swapped.append((module, name, getattr(module, name)))
            setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, had in swapped:
            setattr(module, name, had)


class _Sizes(dict[Any, Any]):
    """What gives a size. Computations of equal expressions are one entry, and the objects of these
    sizes are let go of. What a tensor gives stays its own: a file has sizes, but no strides."""

    def __setitem__(self, size: Any, given: Any) -> None:
        function = getattr(getattr(given, "f", None), "func", None)
        computed = getattr(function, "__name__", "") == COMPUTED
        super().__setitem__(_expression(size) if computed else size.node, given)

    def __getitem__(self, size: Any) -> Any:
        own = super().__contains__(size.node)
        return super().__getitem__(size.node if own else _expression(size))

    def __contains__(self, size: Any) -> bool:
        return super().__contains__(size.node) or super().__contains__(_expression(size))

    def get(self, size: Any, default: Any = None) -> Any:
        with suppress(KeyError):
            return self[size]
        return default


def _expression(size: Any) -> Any:
    return size.node.pytype, getattr(size.node, "_expr", size.node)


def _sources() -> dict[str, str]:
    """The source code of all graph modules that there ever were."""
    from torch.fx import graph_module

    return getattr(getattr(graph_module, "_loader", None), "eval_cache", {})


def _forget(known: set[str]) -> None:
    from torch.fx.experimental import proxy_tensor
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    sources = _sources()
    for name in sources.keys() - known:
        sources.pop(name, None)
        linecache.cache.pop(name, None)
