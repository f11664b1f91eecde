"""A model as the rest of the package calls it: one adapter for plain modules, one for Hugging Face's.

Nobody else asks what kind of model there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .arguments import bind
from .example_inputs import infer_inputs


class Host:
    """A plain module. module: the model itself or a structural copy of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.name = type(module).__name__
        self.signature = inspect.signature(module.forward)

    @property
    def config(self) -> Any:
        return getattr(self.module, "config", None)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name. Raises InputError."""
        return bind(self.signature, self.name, args, kwargs)

    def example_inputs(self) -> dict[str, Any]:
        """Arguments to capture the model with. Raises InputError where none can be inferred."""
        return infer_inputs(self.module)

    def arguments(self, example: Any) -> dict[str, Any]:
        """`example_inputs` as a user gives them (tensor, tuple or dict; None: inferred) as arguments
        by name, without a cache: graphs that keep one come when they are asked for."""
        if example is None:
            named = self.example_inputs()
        elif isinstance(example, torch.Tensor):
            named = self.bind((example,), {})
        elif isinstance(example, (tuple, list)):
            named = self.bind(tuple(example), {})
        else:
            try:  # a dict, a tokenizer's BatchEncoding and the like
                given = dict(example)
            except (TypeError, ValueError):
                raise InputError(
                    f"example_inputs={type(example).__name__}: expected a tensor, a tuple or a dict"
                ) from None
            named = self.bind((), given)
        return self.without_cache(named)

    def vocabulary(self) -> int:
        """How many ids the model takes."""
        tables = (m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding))
        return next(tables, 2)

    def declares_causal(self, rows: str | None) -> bool:
        """Whether the model is causal by its own word; rows: the argument whose positions count."""
        return True

    def traced(self) -> AbstractContextManager[None]:
        """What torch.export needs around a trace of the module."""
        return nullcontext()

    # -- key-value caches ------------------------------------------------------------------------

    @property
    def keeps_cache(self) -> bool:
        """Whether a plain call hands back a key-value cache or another state."""
        return False

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same call with no cache in it and none in its outputs."""
        return arguments

    def with_new_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same call, which begins a cache. Raises InputError where the model keeps none."""
        raise InputError(f"{self.name} keeps no key-value cache")

    def split_cache(
        self, arguments: dict[str, Any], training: bool
    ) -> tuple[dict[str, Any], bool, Any]:
        """A call's other arguments, whether it keeps a cache, and the cache that it brings.

        Raises InputError for arguments that the model does not take.
        """
        return arguments, False, None

    def cache_format(self) -> Any:
        """What makes caches that the model's graphs take; runs the module."""
        raise InputError(f"{self.name} keeps no key-value cache")

    def generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's generate(), with `call` instead of its forward."""
        raise InputError(f"{self.name} has no generate()")
