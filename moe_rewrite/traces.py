"""Traces of PyTorch that take less memory, and leave less of it taken.

PyTorch keeps what a trace has seen, graphs and shapes, until the next one comes: of a small model
that is as much as its weights. All of it are caches and a list for its own checks, under names that
may go; without them nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

CACHE = "fake_tensor_cache_enabled"  # which at a model's number of operators saves no time


@contextmanager
def frugal_traces() -> Iterator[None]:
    """For torch.export and torch.onnx.export."""
    import torch._dynamo.config as config

    context: Any = config.patch(CACHE, False) if hasattr(config, CACHE) else nullcontext()  # type: ignore[attr-defined]
    try:
        with context:
            yield
    finally:
        _forget()


def _forget() -> None:
    from torch.fx.experimental import proxy_tensor
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
