"""Traces of PyTorch that take less memory, and leave less of it taken.

PyTorch makes a node of every computation with sizes that its checks do, and keeps what a trace has
seen, graphs, shapes and source code, until the next one comes or for ever: of a small model that is
as much as its weights. All of it has names that may go; without them nothing is done.
"""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

CACHE = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time
EAGER = "maybe_disable_thunkify"  # around the model's own code


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
    try:
        wrappers: Any = importlib.import_module(
            "torch._functorch._aot_autograd.graph_capture_wrappers"
        )
        eager = getattr(wrappers, EAGER)
    except (ImportError, AttributeError):
        yield
        return
    setattr(wrappers, EAGER, nullcontext)
    try:
        yield
    finally:
        setattr(wrappers, EAGER, eager)


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
