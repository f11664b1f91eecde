"""Large results on the CPU in the memory that the last such result left.

What is freed in large blocks goes back to the system, and new memory comes a page of 4 KB at a
time, filled with zeros. For experts' gradients and what is saved for them this takes up to a fifth
of a training step (`benchmarks/cpu.py`), and every step frees what the next asks for.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 1 << 20  # bytes
MOST = 1 << 30  # bytes that are kept, in all


class CachedBuffer(NamedTuple):
    """Memory, and how many users were counted when it was handed out once, itself among them."""

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
    """Tensors and Python objects that hold this memory, and a constant."""
    storage = values.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


_of_weights: MutableMapping[torch.Tensor, dict[str, CachedBuffer]] = WeakIdKeyDictionary()
_of_calls: dict[str, CachedBuffer] = {}  # what no call needs any more when it returns


def reused(like: torch.Tensor, *size: int, owner: torch.Tensor | None, use: str) -> torch.Tensor:
    """(*size), unwritten, of the dtype and device of `like`.

    On the CPU, if it is large, in the memory of the last one of this use and of this owner, a
    weight with which that goes, unless something else has it still; the owner is None for what a
    call frees before it returns.
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
