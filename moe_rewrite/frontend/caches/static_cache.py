"""Key-value caches of a fixed size: each position is written in place, no call allocates one.

Imports transformers, so it is imported only for a Hugging Face model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from ...errors import InputError


class FixedLayer(StaticLayer):
    """keys, values: (batch, heads, longest, width). position: () int64, the number of positions that
    are filled, which all layers of a cache share; a call's end moves it, not a layer's update."""

    keys: Any
    values: Any
    cumulative_length: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.keys, self.values, self.cumulative_length = keys, values, position
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @property
    def max_cache_len(self) -> int:  # type: ignore[override]
        return self.keys.shape[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(key_states.shape[-2], device=key_states.device) + self.cumulative_length
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        index = beam_idx.to(self.keys.device)
        self.keys.copy_(self.keys.index_select(0, index))
        self.values.copy_(self.values.index_select(0, index))


class TracedCache(Cache):
    """The layers of a FixedCache as a graph takes them: keys and values of each, then the position."""

    layers: list[Any]

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)


class FixedCache(Cache):
    """What ``cache_implementation="static"`` gives a converted model.

    length: as `position`, known without reading the tensor. longest: positions that fit.
    """

    # generate() prepares a 4-D mask for caches that are, of which no router reads what is padding
    is_compileable = False  # type: ignore[assignment]
    layers: list[Any]

    def __init__(self, layers: list[Any], longest: int) -> None:
        super().__init__(layers=layers)
        self.longest, self.length = longest, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def require_room(self, batch: int, positions: int) -> None:
        """Raises InputError for a call that does not fit."""
        size = self.layers[0].keys.shape[0]
        if batch != size:
            raise InputError(
                f"a batch of {batch} with a static cache for {size}: make another cache"
            )
        if self.length + positions > self.longest:
            raise InputError(
                f"{positions} more positions after {self.length}: this static cache has room for "
                f"{self.longest}; generate with a larger max_length or max_cache_len"
            )

    def advance(self, positions: int) -> None:
        self.length += positions
        self.layers[0].cumulative_length.add_(positions)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions, as a negative number: the layers share the one that moves."""
        self.advance(-abs(tokens_to_remove))
        for layer in self.layers:
            if not isinstance(layer, FixedLayer):  # the router's state
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Empty the cache for another text."""
        super().reset()
        self.length = 0


def fixed_cache(
    shapes: list[tuple[int, int, int]], batch: int, longest: int, like: torch.Tensor
) -> FixedCache:
    """An empty cache. shapes: of each layer (heads, key width, value width). like: has its dtype and
    device. There is room for one position more than fit, so that no mask is as long as the cache,
    which would be a case of its own."""
    position = torch.zeros((), dtype=torch.long, device=like.device)

    def empty(heads: int, width: int) -> torch.Tensor:
        return like.new_zeros(batch, heads, longest + 1, width)

    layers = [FixedLayer(empty(h, k), empty(h, v), position) for h, k, v in shapes]
    return FixedCache(layers, longest)


def _flatten(cache: TracedCache) -> tuple[list[torch.Tensor], None]:
    leaves = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [*leaves, cache.layers[0].cumulative_length], None


def _flatten_with_keys(cache: TracedCache) -> tuple[list[tuple[Any, Any]], None]:
    leaves, context = _flatten(cache)
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context


def _unflatten(leaves: Any, context: None) -> TracedCache:
    *pairs, position = leaves
    layers = [FixedLayer(k, v, position) for k, v in zip(pairs[::2], pairs[1::2], strict=True)]
    return TracedCache(layers)


pytree.register_pytree_node(
    TracedCache, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="moe_rewrite.TracedCache",
    to_dumpable_context=lambda context: None, from_dumpable_context=lambda context: None,
)  # fmt: skip
