"""Quotients of sizes by torch.div, which makes a tensor of them (``x.view(torch.div(n, 4), 4)``): a
trace would not know their values, though they follow from the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def known_quotients() -> Iterator[None]:
    """In this context, the rounded quotient of two sizes that are constants holds a known number."""
    original = torch.div

    @wraps(original)
    def div(input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(input, other, *args, **kwargs)
        sizes = type(input) is int and type(other) is int and input >= 0 and other > 0
        rounded = kwargs.get("rounding_mode") in ("trunc", "floor")
        if sizes and rounded and isinstance(made, FakeTensor):
            made.item_memo = input // other
        return made

    torch.div = div  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.div = original  # type: ignore[assignment]
