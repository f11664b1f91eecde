"""What only Hugging Face models need: example inputs, tracing helpers, key-value caches.

The only module of the library that imports transformers; reached only with such a model in hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.exporters.exporter_dynamo import (
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import apply_patches
from transformers.utils import TransformersKwargs

from .errors import CaptureError, InputError

CACHE = "past_key_values"
EXAMPLE_BATCH, EXAMPLE_LENGTH = 3, 9
# what a model may take beyond its signature
KNOWN_KWARGS = set(TransformersKwargs.__annotations__) | {"use_cache", "return_dict"}
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@contextmanager
def tracing(host: nn.Module) -> Iterator[None]:
    """transformers' own patches for torch.export, undone on exit."""
    register_cache_pytrees_for_model(host)
    with ExitStack() as stack:
        stack.enter_context(apply_patches("dynamo"))
        stack.enter_context(reset_model_state(host))
        yield


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Example arguments from the model's configuration."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
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


def is_causal_lm(model: nn.Module) -> bool:
    """Whether generate() with a key-value cache makes sense for this model."""
    takes = inspect.signature(model.forward).parameters
    return (
        CACHE in takes
        and "input_ids" in takes
        and not model.config.is_encoder_decoder
        and bool(model.can_generate())
    )


def default_use_cache(model: nn.Module) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "use_cache", False))


class CacheFormat:
    """Shapes of the layers of a model's key-value cache, and how to fill and read such a cache.

    A converted model keeps full-length layers for every kind of attention: a window is applied by
    the mask of the captured graph, so sliding layers need no cache of their own.
    """

    def __init__(self, host: nn.Module) -> None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=host.device)
        with torch.no_grad():
            cache = host(input_ids=ids, use_cache=True)[CACHE]
        self.shapes: list[tuple[int, int, int]] = []  # (heads, key width, value width)
        for layer in cache.layers:
            if type(layer) not in PLAIN_LAYERS or not layer.is_initialized:
                raise CaptureError(
                    f"the cache of {type(host).__name__} has a {type(layer).__name__}, which "
                    "is not a plain key-value layer: generate with use_cache=False"
                )
            keys, values = layer.keys, layer.values
            self.shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
            self.dtype, self.device = keys.dtype, keys.device

    def new(self, batch: int) -> Any:
        cache = DynamicCache()
        self._empty(cache, batch)
        return cache

    def _empty(self, cache: Any, batch: int) -> None:
        cache.layers = []
        for heads, key_width, value_width in self.shapes:
            layer = DynamicLayer()
            layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
            layer.keys = torch.zeros(
                batch, heads, 0, key_width, dtype=self.dtype, device=self.device
            )
            layer.values = torch.zeros(
                batch, heads, 0, value_width, dtype=self.dtype, device=self.device
            )
            cache.layers.append(layer)

    def adopt(self, cache: Any, batch: int) -> Any:
        """Make a cache that the user or generate() passes one of full-length plain layers.

        An empty cache of any layer kinds is refitted in place; a used one must be ours already.
        """
        if cache is None:
            return self.new(batch)
        if not isinstance(cache, Cache):
            raise InputError(
                f"{CACHE}={type(cache).__name__}: expected a transformers DynamicCache"
            )
        layers = kv_layers(cache)
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
        if plain and len(layers) == len(self.shapes):
            return cache
        if any(layer.is_initialized and layer.get_seq_length() > 0 for layer in layers):
            raise InputError(
                f"this {type(cache).__name__} was filled by another model or has layers "
                f"{sorted({type(la).__name__ for la in layers})}: start from an empty DynamicCache"
            )
        if type(cache) is not DynamicCache:
            raise InputError(
                f"{CACHE}={type(cache).__name__}: only a DynamicCache can be used; leave "
                "cache_implementation at its default"
            )
        self._empty(cache, batch)
        return cache


def kv_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, RouterState)]


def cache_leaves(cache: Any) -> list[torch.Tensor]:
    """Keys and values in the order in which torch.export flattens a cache."""
    return [t for layer in kv_layers(cache) for t in (layer.keys, layer.values)]


def fill_cache(cache: Any, leaves: list[torch.Tensor]) -> None:
    for i, layer in enumerate(kv_layers(cache)):
        layer.keys, layer.values = leaves[2 * i], leaves[2 * i + 1]


def bare_cache(cache: Any) -> Any:
    """The same layers in a cache without the router's state, as capture wants it."""
    bare = DynamicCache()
    bare.layers = kv_layers(cache)
    return bare


class RouterState(CacheLayerMixin):
    """The running sum and count of a prefix router, kept as one more layer of the cache.

    As a layer it is reordered, repeated and selected with the keys in beam search and the like.
    total: (batch, width) fp32; count: (batch,) fp32.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.total: torch.Tensor | None = None
        self.count: torch.Tensor | None = None
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise InputError("a router's state holds no keys")

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        raise InputError("a router's state holds no keys")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def store(self, total: torch.Tensor, count: torch.Tensor, length: int) -> None:
        self.total, self.count, self.length = total, count, length
        self.is_initialized = True

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _select(self, select: Any) -> None:
        if self.total is not None and self.count is not None:
            self.total, self.count = select(self.total), select(self.count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise InputError(
                "a prefix router's running mean cannot be cropped (assisted decoding does that): "
                "generate without an assistant, or convert with TokenRouter(granularity='token')"
            )


def router_state(cache: Any) -> RouterState:
    """The cache's router state, added where it has none yet."""
    for layer in cache.layers:
        if isinstance(layer, RouterState):
            return layer
    if kv_layers(cache)[0].get_seq_length() > 0:
        raise InputError(
            "this cache was filled without the router's state: start from an empty one"
        )
    state = RouterState()
    cache.layers.append(state)
    return state
