"""What only Hugging Face models need: example inputs, tracing helpers, their calls, generate().

Imports transformers; reached only with such a model in hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from transformers.exporters.exporter_dynamo import (
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import apply_patches
from transformers.utils import TransformersKwargs

from ..errors import InputError
from ..ir.program import CACHE

EXAMPLE_BATCH, EXAMPLE_LENGTH = 3, 9
# what a model may take beyond its signature
KNOWN_KWARGS = set(TransformersKwargs.__annotations__) | {"use_cache", "return_dict"}


@contextmanager
def patched(host: Any) -> Iterator[None]:
    """transformers' own patches for torch.export, undone on exit."""
    register_cache_pytrees_for_model(host)
    with ExitStack() as stack:
        stack.enter_context(apply_patches("dynamo"))
        stack.enter_context(reset_model_state(host))
        yield


def example_inputs(model: Any) -> dict[str, Any]:
    """Example arguments from the model's configuration."""
    config: Any = model.config
    takes = _takes(model.__class__)
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.long, device=model.device)
    main = model.main_input_name
    if main == "input_ids":
        example = {"input_ids": ids}
        if "attention_mask" in takes:
            example["attention_mask"] = torch.ones_like(ids)
        if config.is_encoder_decoder and "decoder_input_ids" in takes:
            example["decoder_input_ids"] = ids.clone()
        return example
    if main == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (EXAMPLE_BATCH, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}
    raise InputError(
        f"{type(model).__name__} takes {main}, for which no example is known: pass example_inputs, "
        "a dict of tensors with a batch dimension first"
    )


@cache
def _takes(kind: Any) -> tuple[str, ...]:
    """The named arguments of this class's forward."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def is_causal_lm(model: Any) -> bool:
    """Whether generate() with a key-value cache makes sense for this model."""
    takes = _takes(model.__class__)
    return (
        CACHE in takes
        and "input_ids" in takes
        and not model.config.is_encoder_decoder
        and bool(model.can_generate())
    )


def keeps_cache(model: Any) -> bool:
    """Whether a plain call of this model hands back a key-value cache or another state."""
    takes = _takes(model.__class__)
    return "use_cache" in takes or bool({CACHE, "cache_params"} & set(takes))


def without_cache(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with no cache in it and none in its outputs."""
    if not keeps_cache(model):
        return arguments
    return {k: v for k, v in arguments.items() if k != CACHE} | {"use_cache": False}


def call_arguments(
    host: Any, arguments: dict[str, Any], training: bool
) -> tuple[dict[str, Any], bool, Any]:
    """Split a call into its arguments, whether it keeps a cache, and the cache that it brings.

    Raises InputError for arguments that the model does not take, and for a cache where the model
    is no decoder-only language model.
    """
    takes = _takes(host.__class__)
    unknown = set(arguments).difference(takes, KNOWN_KWARGS)
    if unknown:
        raise InputError(
            f"{type(host).__name__} takes no argument {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(takes)}"
        )
    asked, given = arguments.get("use_cache"), arguments.get(CACHE)
    if is_causal_lm(host):
        config = host.config.get_text_config(decoder=True)
        default = bool(getattr(config, "use_cache", False)) and not training
        keep = given is not None or (default if asked is None else bool(asked))
        rest = {k: v for k, v in arguments.items() if k not in (CACHE, "use_cache")}
        return rest | {"use_cache": keep}, keep, given
    if asked or given is not None or arguments.get("cache_params") is not None:
        raise InputError(
            f"use_cache={asked!r}: a converted {type(host).__name__} keeps no cache; decoder-only "
            "language models do"
        )
    return without_cache(host, arguments), False, None


def generate(host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """transformers' generate() of `host`, with `call` in the place of its forward."""
    if not is_causal_lm(host):
        raise InputError(
            f"{type(host).__name__}.generate(): only decoder-only language models generate on "
            "their converted graphs; call to_dense().generate() for the original"
        )
    dense = host.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        host.__dict__.pop("forward", None)  # the host itself may have to be captured now
        try:
            return call(*args, **kwargs)
        finally:
            host.forward = forward

    forward.__signature__ = inspect.signature(dense)  # type: ignore[attr-defined]
    host.forward = forward
    try:
        return host.generate(*args, **kwargs)
    finally:
        host.__dict__.pop("forward", None)
