"""Hashable keys of values, by type and content."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

ATOMS = (
    bool, int, str, bytes, type(None), enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def content_key(value: Any, other: Callable[[Any], Any]) -> Any:
    """A key that is equal only for values with the same types and contents.

    Supports None, bools, numbers, strings, dtypes, devices, enumerations and NumPy arrays, in
    lists, tuples, slices and dicts. other: makes the key of anything else, or raises.
    """
    kind = type(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return kind, value.shape, value.dtype.str, content
    if isinstance(value, ATOMS):
        return kind, value
    if isinstance(value, (float, complex, np.generic)):  # 0.0 == -0.0, and no NaN equals itself
        return kind, np.asarray(value).dtype.str, np.asarray(value).tobytes()
    if isinstance(value, (list, tuple)):
        return kind, tuple(content_key(v, other) for v in value)
    if isinstance(value, slice):
        return kind, tuple(content_key(v, other) for v in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        pairs = ((content_key(k, other), content_key(v, other)) for k, v in value.items())
        return kind, tuple(pairs)
    return other(value)
