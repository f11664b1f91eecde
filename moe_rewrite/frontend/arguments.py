"""A call's arguments: bound to names, and split into tensors and constants."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError


def bind(
    signature: inspect.Signature, model: str, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The call's arguments by name, without those that are None or equal their default.

    Raises InputError where the model's forward would raise TypeError.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{model}: {error}. It takes {signature}; pass these arguments.") from None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(value)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise InputError(
                f"{model}.forward takes *{name}, which cannot be captured by name. "
                "Give forward named arguments."
            )
        elif not (parameter.default is not parameter.empty and _same(value, parameter.default)):
            named[name] = value
    return {k: v for k, v in named.items() if v is not None}


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


def split_static(
    arguments: dict[str, Any], open_ints: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the captured graph, and the others, which are its constants. open_ints: arguments
    that are ints and inputs; else inputs hold tensors."""
    traced, static = {}, {}
    for name, value in arguments.items():
        if name in open_ints:
            traced[name] = value
            continue
        leaves = pytree.tree_leaves(value)
        tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        if tensors and all(tensors):
            traced[name] = value
        elif any(tensors):
            raise InputError(f"{name} mixes tensors and other values: pass tensors only")
        else:
            static[name] = value
    return traced, static


def leaves_of(given: Any) -> list[Any]:
    """The leaves of one argument, as a trace takes them."""
    if isinstance(given, torch.Tensor):
        return [given]
    if type(given).__name__ == "DynamicCache":  # the same, without pytree's way through the object
        return [t for layer in given.layers for t in (layer.keys, layer.values)]
    return pytree.tree_leaves(given)


def is_fixed(cache: Any) -> bool:
    """Whether a key-value cache has a fixed size; see `static_cache`."""
    return type(cache).__name__ == "TracedCache"


def is_paged(cache: Any) -> bool:
    """Whether it stands for the cache of continuous batching; see `paged_cache`."""
    return type(cache).__name__ == "PagedLayers"


def is_cache(given: Any) -> bool:
    """Whether an argument is a key-value cache: an instance of another class than a tensor or plain
    container, which holds tensors (batch, heads, length, width)."""
    plain = isinstance(given, (torch.Tensor, list, tuple, dict))
    return not plain and any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(given))


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether an image's channels are its innermost dimension in memory, as a trace bakes in."""
    plain = tensor.ndim != 4 or tensor.is_contiguous()
    return not plain and tensor.is_contiguous(memory_format=torch.channels_last)
