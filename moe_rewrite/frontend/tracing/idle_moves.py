"""Calls of `Module.to` in a forward: those that change nothing are skipped in a trace, which cannot
replace parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import nn


@contextmanager
def idle_moves() -> Iterator[None]:
    """In this context, a module that has the dtype and device already stays as it is."""
    original = nn.Module.to

    @wraps(original)
    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        tensors = chain(self.parameters(), self.buffers())
        idle = form is None and all(
            (device is None or t.device == device)
            and (dtype is None or t.dtype == dtype or not t.is_floating_point())
            for t in tensors
        )
        return self if idle else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]
