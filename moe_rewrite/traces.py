"""Traces of PyTorch that take less memory, and leave less of it taken.

PyTorch keeps what a trace has seen, graphs, shapes and source code, until the next one comes or for
ever: of a small model that is as much as its weights. All of it has names that may go; without them
nothing is done.
"""

from __future__ import annotations

import gc
import linecache
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

CACHE = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time


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
def frugal_traces() -> Iterator[None]:
    """For torch.export and torch.onnx.export."""
    import torch._dynamo.config as config

    context: Any = config.patch(CACHE, False) if hasattr(config, CACHE) else nullcontext()  # type: ignore[attr-defined]
    known = set(_sources())
    try:
        with context:
            yield
    finally:
        _forget(known)


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
