"""A copy of a model's structure over the same storage, and the names of its tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import CaptureError


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are new objects over the same storage.

    The copy can change its mode, be cast or traced without any effect on the original. Its
    parameters do not require gradients, since dense weights are frozen.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.detach()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied in structure ({error}). Remove attributes "
            "that Python's copy.deepcopy refuses (open files, locks, non-leaf tensors)."
        ) from error


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every state-dict name, tied ones included, to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names
