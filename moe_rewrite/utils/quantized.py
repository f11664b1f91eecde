"""Weights that are stored quantised: a subclass of torch.Tensor that holds packed values and their
scales, and acts as a matrix of another dtype (torchao's; `frontend.packed_weight` makes one of
bitsandbytes' parameters).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharded import hollow, is_sharded


def is_quantized(tensor: Any) -> bool:
    return is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor)


def stand_ins(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """By the id of each quantised tensor among those of a model, a plain one of its size that holds
    no memory, for code that reads no values.

    It has the dtype in which the model computes: the tensor's own if others of the model have it,
    else that of most (a cast of the model may leave quantised tensors as they are).
    """
    given = list(tensors)
    dtypes = Counter(t.dtype for t in given if t.is_floating_point() and not is_quantized(t))
    most = dtypes.most_common(1)[0][0] if dtypes else None
    return {
        id(t): hollow(t, t.dtype if t.dtype in dtypes else most) for t in given if is_quantized(t)
    }


def dequantized(
    tensors: dict[str, torch.Tensor], among: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors; of quantised ones the values that they stand for, in the dtype in which the model
    computes whose tensors are `among`."""
    like = stand_ins(among) if any(map(is_quantized, tensors.values())) else {}
    return {
        name: t.dequantize().to(like[id(t)].dtype) if is_quantized(t) else t
        for name, t in tensors.items()
    }


def scheme(tensor: Any) -> str:
    """Text: how a quantised tensor is stored, such as ``Int8Tensor(block_size=[1, 64], ...)``."""
    _, facts = tensor.__tensor_flatten__()
    known = facts if isinstance(facts, dict) else dict(enumerate(facts or ()))
    said = sorted(f"{name}={given}" for name, given in known.items() if given not in (None, False))
    return f"{type(tensor).__name__}({', '.join(said)})"


def inner_tensors(tensor: Any) -> dict[str, torch.Tensor]:
    """The plain tensors that a quantised one holds, by name."""
    found: dict[str, torch.Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if is_quantized(inner):
            found |= {f"{name}.{n}": t for n, t in inner_tensors(inner).items()}
        else:
            found[name] = inner
    return found


def stored_bytes(tensor: torch.Tensor) -> int:
    """The memory of a tensor's values, scales included."""
    held = inner_tensors(tensor).values() if is_quantized(tensor) else [tensor]
    return sum(t.numel() * t.element_size() for t in held)
