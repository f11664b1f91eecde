"""The adapter through which the package calls a model: this one for plain modules, a subclass for
Hugging Face's. No other code distinguishes kinds of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import nn

from ..errors import InputError
from ..utils.quantized import stand_ins
from .arguments import bind
from .example_inputs import infer_inputs
from .tools.model_class import class_like, values_before_class
from .tracing.own_gradients import whole_functions
from .weights.structural_copy import named_tensors, tensors_of, working_copy


class Host:
    """A plain module. module: the model itself or a structural copy of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.name = type(module).__name__
        self.signature = inspect.signature(module.forward)

    def working_copy(self, own: Mapping[int, torch.Tensor] | None = None) -> Self:
        """A host to trace or run and to throw away; see `structural_copy.working_copy`."""
        return type(self)(working_copy(self.module, own))

    def copy_to_trace(self) -> Self:
        """A working copy to run on fake tensors, which sees the matrices that quantised weights
        stand for."""
        return self.working_copy(stand_ins(t for _, t in named_tensors(self.module)))

    def copy_on_meta(self) -> Self:
        """A working copy whose tensors have no values, to learn shapes from; quantised weights are
        the matrices that they stand for."""
        plain = stand_ins(t for _, t in named_tensors(self.module))
        tensors = tensors_of(self.module)
        return self.working_copy(
            {id(t): torch.empty_like(plain.get(id(t), t), device="meta") for t in tensors}
        )

    @property
    def config(self) -> Any:
        return getattr(self.module, "config", None)

    def model_class(self, base: type) -> type:
        """The class of this module's conversion, a subclass of `base`."""
        return class_like(base, self.module)

    def values_for(self, made: nn.Module, base: type) -> dict[str, Any]:
        """The module's values that an instance of its `model_class` needs as values of its own."""
        return values_before_class(made, base, self.module)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name. Raises InputError."""
        return bind(self.signature, self.name, args, kwargs)

    def example_inputs(self) -> dict[str, Any]:
        """Arguments to capture the model with. Raises InputError where none can be inferred."""
        return infer_inputs(self.copy_to_trace().module)

    def arguments(self, example: Any) -> dict[str, Any]:
        """A user's `example_inputs` (tensor, tuple or dict; None: inferred) as arguments by name.

        Without a key-value cache: graphs with one are captured when first called.
        """
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
        """The size of the model's vocabulary."""
        tables = (m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding))
        return next(tables, 2)

    def declares_causal(self, rows: str | None) -> bool:
        """Whether the model says that it is causal. rows: the argument with the positions."""
        return True

    def traced(self) -> AbstractContextManager[None]:
        """The context in which torch.export traces the module."""
        return whole_functions()

    # -- key-value caches ------------------------------------------------------------------------

    @property
    def keeps_cache(self) -> bool:
        """Whether a plain call returns a key-value cache or another state."""
        return False

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same call with no cache in it and none in its outputs."""
        return arguments

    def with_new_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same call with an empty cache. Raises InputError for a model without a cache."""
        raise InputError(f"{self.name} keeps no key-value cache")

    def split_cache(
        self, arguments: dict[str, Any], training: bool, caches: Callable[[], Any]
    ) -> tuple[dict[str, Any], bool, Any]:
        """A call's other arguments, whether it uses a cache, and the cache that was passed or None.

        caches: gives the CacheFormat of the model's graphs.

        Raises InputError for arguments that the model does not take.
        """
        return arguments, False, None

    def cache_format(self) -> Any:
        """The CacheFormat of the model's graphs; runs the module once."""
        raise InputError(f"{self.name} keeps no key-value cache")

    def generate(
        self, call: Callable[..., Any], caches: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The model's generate(), with `call` instead of its forward. caches: gives the CacheFormat
        of the model's graphs."""
        raise InputError(f"{self.name} has no generate()")
