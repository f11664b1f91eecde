"""Reuse of large CPU buffers: a result is written into the memory of the last one of its kind.

Large freed blocks go back to the system, and new memory is mapped in pages of 4 KB filled with
zeros. For experts' gradients and saved tensors this takes up to a fifth of a training step
(`benchmarks/speed/cpu.py`), although every step frees what the next one allocates.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 1 << 20  # bytes
MOST = 1 << 30  # bytes that are kept in total


class CachedBuffer(NamedTuple):
    """A buffer, and the number of its users when it was handed out: the cache and the caller."""

    values: torch.Tensor
    users: int

    @classmethod
    def of(cls, made: torch.Tensor) -> CachedBuffer:
        values = made.detach()
        return cls(values, _users(values))

    def bytes(self) -> int:
        return self.values.untyped_storage().nbytes()

    def free(self) -> bool:
        return _users(self.values) < self.users and not self.values.is_shared()


def _users(values: torch.Tensor) -> int:
    """The number of tensors and Python objects that hold this memory, plus a constant."""
    storage = values.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


_of_weights: MutableMapping[torch.Tensor, dict[str, CachedBuffer]] = WeakIdKeyDictionary()
_of_calls: dict[str, CachedBuffer] = {}  # temporaries that a call frees before it returns


def reused(like: torch.Tensor, *size: int, owner: torch.Tensor | None, use: str) -> torch.Tensor:
    """An uninitialised tensor (*size), with the dtype and device of `like`.

    A large one on the CPU reuses the memory of the last one of the same use and owner, unless that
    is still held elsewhere.

    owner: the weight with which the memory is freed; None for what a call frees before it returns.
    use: distinguishes the buffers of one owner.
    """
    needed = torch.Size(size).numel() * like.element_size()
    if like.device.type != "cpu" or needed < LARGE:
        return like.new_empty(size)
    known = _of_calls if owner is None else _of_weights.setdefault(owner, {})
    kept = known.pop(use, None)
    if kept is not None and kept.free() and needed <= kept.bytes() <= 2 * needed:
        known[use] = kept
        strides = torch.empty(size, device="meta").stride()
        return like.new_empty(0).set_(kept.values.untyped_storage(), 0, size, strides)
    made = like.new_empty(size)
    everywhere = [_of_calls, *_of_weights.values()]
    if needed + sum(k.bytes() for uses in everywhere for k in uses.values()) <= MOST:
        known[use] = CachedBuffer.of(made)
    return made
