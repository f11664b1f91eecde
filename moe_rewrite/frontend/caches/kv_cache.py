"""Key-value caches: what generate() carries from token to token, the router's state included.

Imports transformers, so it is imported only for a Hugging Face model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ...errors import InputError
from ...routing.plan import PrefixState
from .opaque_cache import OpaqueCache, filling, prepare, stand_in, updates_itself
from .paged_cache import PagedCall, PagedLayers
from .static_cache import FixedCache, TracedCache, fixed_cache

KEPT = 64  # positions of a call that assisted decoding may take back
# names of the argument and output that hold a cache: `cache` since transformers 5.24
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class _GroupedShapes(TorchFunctionMode):
    """On fake tensors PyTorch's grouped product takes bf16 alone; only its shape matters here."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            rows, weights = args[:2]
            return rows.new_empty(*rows.shape[:-1], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _cache_of(host: Any) -> Any:
    """The cache that a call returns. The call is on the meta device; with grouped products replaced
    where that fails; or, where code computes on another device too, on fake tensors, which takes
    several times as long. Raises what the model raises."""
    with torch.no_grad():
        for grouped in (nullcontext(), _GroupedShapes()):
            with suppress(RuntimeError, ValueError), grouped:
                ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
                model = _without_pages(host.copy_on_meta())
                return model(input_ids=ids, use_cache=True)[host.cache_name]
        model = _without_pages(host.copy_to_trace())
        with FakeTensorMode(allow_non_fake_inputs=True), _GroupedShapes():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            return model(input_ids=ids, use_cache=True)[host.cache_name]


def _without_pages(host: Any) -> Any:
    """A copy's module, whose attention takes a plain cache."""
    if host.config._attn_implementation == "paged|eager":
        host.module.set_attn_implementation("eager")
    return host.module.eval()


class CacheFormat:
    """Shapes of the layers of a model's key-value cache, and how to make, fill and read one.

    A converted model keeps full-length layers for every kind of attention: the captured graph's
    mask applies a sliding window, so sliding layers need no special cache.

    refusal: why the model's cache cannot be one of its graphs', as where layers keep the state of a
    recurrence; None where it can.
    """

    def __init__(self, host: Any) -> None:
        """host: the Host of the model, which is run without values."""
        self.name, self.device = host.cache_name, host.module.device
        self.shapes: list[tuple[int, int, int]] = []  # (heads, key width, value width)
        self.refusal = self._read(host)

    def _read(self, host: Any) -> str | None:
        try:
            layers = _cache_of(host).layers
        except Exception as error:  # of the model's code, whatever it is
            return (
                f"{host.name} gives no cache that could be read ({type(error).__name__}: {error})"
            )
        for i, layer in enumerate(layers):
            plain = type(layer) in PLAIN_LAYERS
            if not plain or not layer.is_initialized:
                return (
                    f"the cache of {host.name} is not keys and values alone, which its converted graphs "
                    f"take (layer {i}: {type(layer).__name__}{' without keys' if plain else ''})"
                )
            keys, values = layer.keys, layer.values
            self.shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
            self.dtype = keys.dtype
        return None

    def new(self, batch: int) -> Any:
        cache = DynamicCache()
        self._empty(cache, batch)
        return cache

    def new_static(self, batch: int, longest: int) -> FixedCache:
        """An empty cache for a batch and this number of positions. Raises InputError."""
        self._require()
        return fixed_cache(self.shapes, batch, longest, self._like())

    def standing_in(self, arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """The context in which a call, opaque cache or not, changes no cache of the caller's."""
        given = arguments.get("cache", arguments.get(self.name))
        if not isinstance(given, (OpaqueCache, PagedLayers)):
            return nullcontext()
        return filling(stand_in(given.layers, self.shapes, self._like()), len(self.shapes))

    def _like(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _empty(self, cache: Any, batch: int) -> None:
        cache.layers = []
        for heads, key_width, value_width in self.shapes:
            layer: Any = DynamicLayer()  # `dtype` is an attribute of some versions
            layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
            layer.keys = torch.zeros(
                batch, heads, 0, key_width, dtype=self.dtype, device=self.device
            )
            layer.values = torch.zeros(
                batch, heads, 0, value_width, dtype=self.dtype, device=self.device
            )
            cache.layers.append(layer)

    def adopt(self, cache: Any, arguments: dict[str, Any]) -> CallCache | PagedCall:
        """The cache of a call, with full-length plain layers, which is put into `arguments`.

        cache: what the user or generate() passes, or None; a PagedCall has put its own there. An empty DynamicCache with layers of any
        kind is changed in place; one that was used must have plain layers already. Caches of other
        classes, and those that offload, update their own layers. Raises InputError.
        """
        if isinstance(cache, PagedCall):
            return cache
        self._require()
        main = arguments.get("input_ids", arguments.get("inputs_embeds"))
        if main is None:
            raise InputError("pass input_ids or inputs_embeds")
        adopted = CallCache(self._adopted(cache, main.shape[0]), *main.shape[:2])
        if isinstance(adopted.cache, FixedCache):
            adopted.cache.require_room(*main.shape[:2])
        arguments[self.name] = adopted.bare()
        return adopted

    def _require(self) -> None:
        if self.refusal is not None:
            raise InputError(f"{self.refusal}: leave the cache out, or pass use_cache=False")

    def _adopted(self, cache: Any, batch: int) -> Any:
        if cache is None:
            return self.new(batch)
        if not isinstance(cache, Cache):
            raise InputError(
                f"{self.name}={type(cache).__name__}: expected a transformers DynamicCache"
            )
        layers = kv_layers(cache)
        if isinstance(cache, FixedCache) and len(layers) == len(self.shapes):
            return cache
        if updates_itself(cache):
            prepare(cache, layers, len(self.shapes))
            return cache
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
        if plain and len(layers) == len(self.shapes):
            return cache
        if any(layer.is_initialized and layer.get_seq_length() > 0 for layer in layers):
            raise InputError(
                f"this {type(cache).__name__} was filled by another model or has layers "
                f"{sorted({type(la).__name__ for la in layers})}: start from an empty DynamicCache"
            )
        self._empty(cache, batch)
        return cache


def kv_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, RouterState)]


class CallCache:
    """The key-value cache that a call takes and returns.

    cache: the caller's object. batch, positions: of the call. opaque: it updates its own layers.
    """

    def __init__(self, cache: Any, batch: int, positions: int) -> None:
        self.cache, self.batch, self.positions = cache, batch, positions
        self.opaque = updates_itself(cache)

    def filling(self) -> AbstractContextManager[None]:
        """The context in which a graph runs that is called with this cache."""
        return filling(self.cache, len(kv_layers(self.cache))) if self.opaque else nullcontext()

    def bare(self) -> Any:
        """A cache with the same layers but without the router's state, as graphs take it."""
        if self.opaque:
            return OpaqueCache.of(self.cache, self.batch, len(kv_layers(self.cache)))
        if isinstance(self.cache, FixedCache):
            return TracedCache(kv_layers(self.cache))
        bare = DynamicCache()
        bare.layers = kv_layers(self.cache)
        return bare

    def router_state(self) -> RouterState:
        """The router's state in this cache; added if there is none yet."""
        for layer in self.cache.layers:
            if isinstance(layer, RouterState):
                return layer
        if self.cache.get_seq_length() > 0:
            raise InputError(
                "this cache was filled without the router's state: start from an empty one"
            )
        state = RouterState()
        self.cache.layers.append(state)
        return state

    def state_for(self, router: Any) -> PrefixState | None:
        """The router's state before these positions."""
        return self.router_state().load() if router.keeps_state else None

    def keep(self, after: PrefixState | None) -> None:
        """Nothing: the call returned no cache."""

    def fill(self, leaves: list[torch.Tensor], after: PrefixState | None) -> None:
        """Store a call's results: keys and values layer by layer, and the router's state."""
        fixed = isinstance(self.cache, FixedCache)
        if fixed:  # its keys and values are written already
            self.cache.advance(self.positions)
        if after is not None:
            own = fixed or self.opaque
            length = self.cache.get_seq_length() if own else leaves[0].shape[2]
            self.router_state().store(after, length)
        if fixed or self.opaque:
            return
        for i, layer in enumerate(kv_layers(self.cache)):
            layer.keys, layer.values = leaves[2 * i], leaves[2 * i + 1]


class RouterState(CacheLayerMixin):
    """The running sum and count of a prefix router, kept as one more layer of the cache.

    As a layer it is reordered, repeated and selected together with the keys, in beam search for
    example. Assisted decoding takes back positions of the latest call, which are kept one by one.
    total: (batch, width) fp32. count: (batch,) fp32. latest: (batch, positions, width) and (batch,
    positions), both after each of the latest call's last positions, and before the first of these.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.total: torch.Tensor | None = None
        self.count: torch.Tensor | None = None
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None
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

    def load(self) -> PrefixState | None:
        if self.total is None or self.count is None:
            return None
        return PrefixState(self.total, self.count)

    def store(self, state: PrefixState, length: int) -> None:
        self.latest = self._latest(state)
        self.total, self.count, self.length = state.total.clone(), state.count, length
        self.is_initialized = True

    def _latest(self, state: PrefixState) -> tuple[torch.Tensor, torch.Tensor] | None:
        if state.totals is None or state.counts is None:
            return None
        if state.totals.shape[1] > KEPT:
            last = slice(-KEPT - 1, None)
            return state.totals[:, last].clone(), state.counts[:, last].clone()
        total, count = self.total, self.count
        if total is None or count is None:
            total, count = torch.zeros_like(state.total), torch.zeros_like(state.count)
        before = total.unsqueeze(1), count.unsqueeze(1)
        return torch.cat([before[0], state.totals], 1), torch.cat([before[1], state.counts], 1)

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _select(self, select: Any) -> None:
        if self.total is not None and self.count is not None:
            self.total, self.count = select(self.total), select(self.count)
        if self.latest is not None:
            self.latest = select(self.latest[0]), select(self.latest[1])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions, as a negative number. Raises InputError for more than the
        latest call had, or than are kept."""
        removed = abs(tokens_to_remove)
        if removed == 0:
            return
        known = 0 if self.latest is None else self.latest[0].shape[1] - 1
        if self.latest is None or removed > known:
            raise InputError(
                f"crop({tokens_to_remove}): a prefix router's running mean can be taken back by "
                f"the last {known} positions, those of the latest call and {KEPT} at most; for "
                "more, convert with TokenRouter(granularity='token')"
            )
        totals, counts = (t[:, :-removed] for t in self.latest)
        self.latest = totals, counts
        self.total, self.count, self.length = totals[:, -1], counts[:, -1], self.length - removed
