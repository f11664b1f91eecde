"""Inputs for a model: inferred where that is possible, as a user gives them, or random."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .capture import bind, is_hf, make_host


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs to capture a model with, where they can be inferred; else InputError says what to do."""
    if is_hf(model):
        from .huggingface import example_inputs as hf_examples

        return hf_examples(model)
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
    host = make_host(model).eval()
    try:
        with torch.no_grad():
            host(value)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


def as_arguments(model: nn.Module, example: Any) -> dict[str, Any]:
    """`example_inputs` as a user gives them (tensor, tuple or dict) as arguments by name."""
    if example is None:
        return example_inputs(model)
    signature, name = inspect.signature(model.forward), type(model).__name__
    if isinstance(example, torch.Tensor):
        return bind(signature, name, (example,), {})
    if isinstance(example, (tuple, list)):
        return bind(signature, name, tuple(example), {})
    try:  # a dict, a tokenizer's BatchEncoding and the like
        named = dict(example)
    except (TypeError, ValueError):
        raise InputError(
            f"example_inputs={type(example).__name__}: expected a tensor, a tuple or a dict"
        ) from None
    return bind(signature, name, (), named)


def random_arguments(arguments: dict[str, Any], host: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Arguments of the same form with random content: ids in the vocabulary, normal floats."""
    top = _vocabulary(host)
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, t: torch.Tensor) -> torch.Tensor:
        shape = (batch, *t.shape[1:])
        if "mask" in name or "token_type" in name or t.dtype == torch.bool:
            return t.new_ones(shape) if "mask" in name else t.new_zeros(shape)
        if t.is_floating_point():
            return torch.randn(shape, generator=generator).to(t)
        return torch.randint(1, max(top, 2), shape, generator=generator).to(t)

    def fit(name: str, v: Any) -> Any:
        if isinstance(v, torch.Tensor) and v.ndim:
            return fill(name, v)
        return v

    return {n: fit(n, v) for n, v in arguments.items()}


def _vocabulary(host: nn.Module) -> int:
    """How many ids the model takes."""
    if is_hf(host):
        model: Any = host
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:  # a model without a vocabulary
            return 2
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
    return next((m.num_embeddings for m in host.modules() if isinstance(m, nn.Embedding)), 2)
