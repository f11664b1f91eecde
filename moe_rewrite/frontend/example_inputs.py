"""Inputs for a model: inferred from its first layer, or random."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ..errors import InputError
from .weights.structural_copy import structural_copy


def infer_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs of a plain module, where they can be inferred; else InputError says what to do."""
    parameters = [
        p for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]  # fmt: skip
    if len(parameters) == 1 and parameters[0].kind is not parameters[0].VAR_POSITIONAL:
        for candidate in _candidates(model):
            if _runs(model, candidate):
                return {parameters[0].name: candidate}
    raise InputError(
        f"cannot infer inputs for {type(model).__name__}{inspect.signature(model.forward)}: pass "
        "example_inputs, a tensor, a tuple or a dict of tensors with a batch dimension first"
    )


def _candidates(model: nn.Module) -> Iterator[torch.Tensor]:
    """Likely inputs, judged by the first layer that has weights."""
    layers = (nn.Embedding, nn.Conv2d, nn.Linear)
    first = next((m for m in model.modules() if isinstance(m, layers)), None)
    tensor = next(model.parameters(), torch.empty(0))
    options: Any = {"device": tensor.device, "dtype": tensor.dtype}
    if isinstance(first, nn.Embedding):
        yield torch.zeros(3, 9, dtype=torch.long, device=tensor.device)
    elif isinstance(first, nn.Conv2d):
        for size in (32, 64, 224):
            yield torch.zeros(3, first.in_channels, size, size, **options)
    elif isinstance(first, nn.Linear):
        if any("Attention" in type(m).__name__ for m in model.modules()):
            yield torch.zeros(3, 9, first.in_features, **options)
        yield torch.zeros(3, first.in_features, **options)
        yield torch.zeros(3, 9, first.in_features, **options)


def _runs(model: nn.Module, value: torch.Tensor) -> bool:
    """Tried on fake tensors: nothing is computed, and no buffer written."""
    host = structural_copy(model).eval()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            host(fake.from_tensor(value))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return True  # the shapes were right, as far as can be told
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


def random_arguments(arguments: dict[str, Any], vocabulary: int, batch: int = 2) -> dict[str, Any]:
    """Arguments of the same form with random content: ids in the vocabulary, normal floats."""
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, t: torch.Tensor) -> torch.Tensor:
        shape = (batch, *t.shape[1:])
        if "mask" in name or "token_type" in name or t.dtype == torch.bool:
            return t.new_ones(shape) if "mask" in name else t.new_zeros(shape)
        if t.is_floating_point():
            return torch.randn(shape, generator=generator).to(t)
        return torch.randint(1, max(vocabulary, 2), shape, generator=generator).to(t)

    def fit(name: str, v: Any) -> Any:
        if isinstance(v, torch.Tensor) and v.ndim:
            return fill(name, v)
        return v

    return {n: fit(n, v) for n, v in arguments.items()}
