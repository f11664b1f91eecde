"""Key-value caches that keep keys and values in a form of their own: quantised, offloaded to another
device, or a user's. A graph asks the cache of its call to update a layer where the model does, so that
one layer at a time is as large as attention reads it.

Imports transformers, so it is imported only for a Hugging Face model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from ...errors import InputError
from .static_cache import FixedCache

_library = torch.library.Library("moe_rewrite", "FRAGMENT")
_library.define(
    "update_cache(Tensor past, Tensor layer, Tensor keys, Tensor values) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_calls = threading.local()  # .cache: (the one of this thread's call, its layers)


def _updated(
    past: torch.Tensor, layer: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a layer, (batch, heads, length, width), after these new ones.

    past: (batch, 1, positions so far, 0). layer: () int64 on the CPU, its number.
    """
    cache, count = being_filled()
    if cache is None:
        raise InputError(
            "only a call of the model fills a cache of this kind: pass a DynamicCache, or none, to "
            "route(...) and features(...)"
        )
    number = int(layer)
    of_all = cache.update(keys, values, number)
    if getattr(cache, "offloading", False) and number == count - 1:
        cache.prefetch(0, cache.only_non_sliding)  # the router's state is not the next layer
    length = past.shape[2] + keys.shape[2]
    if any(t.shape[2] != length for t in of_all):
        raise InputError(
            f"layer {number} of this {type(cache).__name__} returned "
            f"{[t.shape[2] for t in of_all]} positions, expected all {length}: a converted model "
            "applies windows of attention by its mask; use a cache that keeps every position"
        )
    return of_all


def _fake(
    past: torch.Tensor, layer: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    length = past.shape[2] + keys.shape[2]
    return tuple(t.new_empty(*t.shape[:2], length, t.shape[3]) for t in (keys, values))


_library.impl("update_cache", _updated, "CompositeExplicitAutograd")
_library._register_fake("update_cache", _fake)


class OpaqueLayer(CacheLayerMixin):
    """A layer as a graph sees it. past, number: see `_updated`; all layers share `past`."""

    is_sliding = False

    def __init__(self, past: torch.Tensor, number: torch.Tensor) -> None:
        super().__init__()
        self.past, self.number, self.is_initialized = past, number, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        call = torch.ops.moe_rewrite.update_cache
        return call(self.past, self.number, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.past.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past.shape[2] + query_length, 0

    def get_max_length(self) -> int:
        return -1


class OpaqueCache(Cache):
    """The argument of a graph that stands for a cache of `layers` layers."""

    layers: list[Any]

    @classmethod
    def of(cls, cache: Any, batch: int, count: int) -> OpaqueCache:
        past = torch.empty(batch, 1, cache.get_seq_length(), 0)
        return cls(layers=[OpaqueLayer(past, torch.tensor(i)) for i in range(count)])

    @property
    def past(self) -> torch.Tensor:
        return self.layers[0].past


def updates_itself(cache: Any) -> bool:
    """Whether a cache's layers are more than two plain tensors each."""
    if isinstance(cache, FixedCache):
        return False
    return type(cache) is not DynamicCache or cache.offloading


def prepare(cache: Any, layers: list[Any], count: int) -> None:
    """Make a cache that updates itself ready for graphs of `count` layers. Raises InputError unless
    each of its layers keeps every position.

    layers: its own, without a router's state.
    """
    if torch.is_grad_enabled():
        raise InputError(
            f"a {type(cache).__name__} with gradients: it stores its own copies of keys "
            "and values, through which none flow; call the model under torch.no_grad()"
        )
    if type(cache) is DynamicCache and not cache.get_seq_length():
        cache.layers[: len(layers)] = [DynamicLayer() for _ in range(count)]  # without windows
        return
    fixed = any(isinstance(layer, StaticLayer) or layer.is_sliding for layer in layers)
    if fixed or len(layers) != count:
        raise InputError(
            f"a {type(cache).__name__} with {len(layers)} layers "
            f"{sorted({type(layer).__name__ for layer in layers})}: expected {count} that keep every "
            "position; use a DynamicCache, a QuantizedCache, or the cache that generate() makes for "
            "cache_implementation='static'"
        )


def being_filled() -> tuple[Any, int]:
    """The cache that this thread's graph fills, and its layers; (None, 0) without one."""
    return getattr(_calls, "cache", (None, 0))


@contextmanager
def filling(cache: Any, count: int) -> Iterator[None]:
    """In this context the graphs that this thread runs fill this cache of so many layers."""
    before = being_filled()
    _calls.cache = cache, count
    try:
        yield
    finally:
        _calls.cache = before


def stand_in(
    layers: Sequence[OpaqueLayer], shapes: list[tuple[int, int, int]], like: torch.Tensor
) -> DynamicCache:
    """A plain cache of as many positions with random values, to compare a graph with the model by.

    shapes: of each layer (heads, key width, value width). like: has their dtype and device.
    """
    cache = DynamicCache()
    for opaque, (heads, *widths) in zip(layers, shapes, strict=True):
        batch, _, length, _ = opaque.past.shape
        layer: Any = DynamicLayer()
        given = (torch.randn(batch, heads, length, w).to(like) for w in widths)
        layer.dtype, layer.device, layer.is_initialized = like.dtype, like.device, True
        layer.keys, layer.values = given
        cache.layers.append(layer)
    return cache


def _flatten(cache: OpaqueCache) -> tuple[list[torch.Tensor], None]:
    return [cache.past, *(layer.number for layer in cache.layers)], None


def _flatten_with_keys(cache: OpaqueCache) -> tuple[list[tuple[Any, Any]], None]:
    leaves, context = _flatten(cache)
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context


def _unflatten(leaves: Any, context: None) -> OpaqueCache:
    past, *numbers = leaves
    return OpaqueCache(layers=[OpaqueLayer(past, number) for number in numbers])


pytree.register_pytree_node(
    OpaqueCache, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="moe_rewrite.OpaqueCache",
    to_dumpable_context=lambda context: None, from_dumpable_context=lambda context: None,
)  # fmt: skip
