"""``tensor.data`` in a forward (``weight.data.clamp_(...)``): a trace loses sight of a tensor that is
read by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor


@contextmanager
def detached_data() -> Iterator[None]:
    """In this context, ``tensor.data`` of a traced tensor is ``tensor.detach()``, of the same memory."""
    if not hasattr(proxy_tensor, "get_proxy_mode"):  # not PyTorch's public interface
        yield
        return
    original: Any = torch._C.TensorBase.data

    def read(self: torch.Tensor) -> torch.Tensor:
        mode = proxy_tensor.get_proxy_mode() if isinstance(self, FakeTensor) else None
        known = mode and proxy_tensor.get_proxy_slot(self, mode.tracer, None) is not None
        return self.detach() if known else original.__get__(self)

    torch.Tensor.data = property(read, original.__set__)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        del torch.Tensor.data
