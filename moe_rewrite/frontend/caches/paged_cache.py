"""Calls by transformers' continuous batching: the rows of several requests lie one after the other in
one sample, a mask keeps them apart, and a paged cache holds the keys and values of all requests.

A graph asks that cache to update a layer where the model does; what it takes of the cache is how many
earlier positions each layer reads. Imports transformers, so it is imported only for a Hugging Face
model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.generation.continuous_batching import PagedAttentionCache

from ...errors import InputError
from ...routing.plan import PrefixState
from .opaque_cache import OpaqueLayer, being_filled, filling

READ = ("input_ids", "position_ids", "attention_mask", "logits_to_keep")  # by the model's code
PLACES = (
    "cu_seq_lens_k",
    "max_length_k",
    "read_index",
    "write_index",
    "block_table",
)  # in the cache
OTHER = (
    "cache", "cu_seq_lens_q", "max_length_q", "logits_indices", "logits_processor_args", "use_cache",
    "is_causal",
)  # fmt: skip
STATES = "states_of_the_router"  # attribute of a cache: first page slot -> what a request summed up

_library = torch.library.Library("moe_rewrite", "FRAGMENT")
_library.define(
    "update_pages(Tensor past, Tensor layer, Tensor keys, Tensor values) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _updated(
    past: torch.Tensor, layer: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that these rows may read in a layer, (1, heads, length, width), after their
    own are in the cache.

    past: (1, 1, positions before these rows, 0). layer: () int64 on the CPU, its number.
    """
    cache, _ = being_filled()
    if cache is None:
        raise InputError("a paged cache is filled by calls of the model alone, not by route(...)")
    return cache.update(keys, values, int(layer))


def _fake(
    past: torch.Tensor, layer: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Heads are side by side in memory, but a graph, which takes any layout, is captured without: a
    trace would make conditions of what follows from strides."""
    length = past.shape[2] + keys.shape[2]
    if torch.compiler.is_exporting():
        return tuple(t.new_empty(*t.shape[:2], length, t.shape[3]) for t in (keys, values))
    shapes = ((t, (t.shape[0], length, t.shape[1], t.shape[3])) for t in (keys, values))
    return tuple(t.new_empty(shape).transpose(1, 2) for t, shape in shapes)


_library.impl("update_pages", _updated, "CompositeExplicitAutograd")
_library._register_fake("update_pages", _fake)


class PagedLayer(OpaqueLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        call = torch.ops.moe_rewrite.update_pages
        return call(self.past, self.number, key_states, value_states)


class PagedLayers(PagedAttentionCache):
    """The argument of a graph that stands for a paged cache: attention asks for this class.

    kinds: of each layer; layers of one kind read the same positions, whose number `past` gives.
    """

    layers: list[PagedLayer]

    def __init__(self, kinds: tuple[str, ...], past: list[torch.Tensor], numbers: Any) -> None:
        self.kinds = kinds
        of = dict(zip(sorted(set(kinds)), past, strict=True))
        self.layers = [PagedLayer(of[k], n) for k, n in zip(kinds, numbers, strict=True)]

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: Any
    ) -> Any:
        return self.layers[layer_idx].update(key_states, value_states)

    def example(self, arguments: dict[str, Any], constant: bool) -> dict[str, Any]:
        """Zeros like a call's arguments, with sizes that all differ, as far as they may.

        constant: sizes of 0 and 1 stay what they are.
        """

        def size(given: int, wanted: int) -> int:
            return given if constant and given < 2 else wanted

        batch, length = arguments["input_ids"].shape
        batch, length = size(batch, 3), size(length, 11)
        of_kinds = {kind: layer.past for kind, layer in zip(self.kinds, self.layers, strict=True)}
        past = {k: size(of_kinds[k].shape[2], 17 + 6 * i) for i, k in enumerate(sorted(of_kinds))}

        def mask(given: torch.Tensor, kind: str) -> torch.Tensor:
            return given.new_zeros(batch, 1, length, past[kind] + length)

        made = dict(arguments)
        for name in ("input_ids", "position_ids"):
            made[name] = arguments[name].new_zeros(batch, length)
        masks = arguments["attention_mask"]
        if isinstance(masks, dict):
            made["attention_mask"] = {kind: mask(given, kind) for kind, given in masks.items()}
        else:
            made["attention_mask"] = mask(masks, self.kinds[0])
        if (kept := arguments.get("logits_to_keep")) is not None:
            made["logits_to_keep"] = kept.new_zeros(size(len(kept), 5))
        made["cache"] = PagedLayers(
            self.kinds, [torch.empty(batch, 1, past[k], 0) for k in sorted(past)],
            [layer.number for layer in self.layers],
        )  # fmt: skip
        return made


class PagedCall:
    """What a call by continuous batching says of its rows and of their places in the cache."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Raises InputError for a call that its graphs cannot serve."""
        unknown = set(arguments).difference(READ, PLACES, OTHER)
        if unknown:
            raise InputError(
                f"continuous batching with {', '.join(sorted(unknown))}: a converted model knows "
                f"{', '.join((*READ, *PLACES, *OTHER))}; use transformers 5.23 or 5.24"
            )
        if torch.is_grad_enabled():
            raise InputError("a paged cache keeps no gradients: call under torch.no_grad()")
        masks, of = arguments.get("attention_mask"), arguments
        if masks is None or of.get("block_table") is not None:
            raise InputError(
                "continuous batching without a mask, as flash attention has it: graphs are captured "
                "with attn_implementation 'sdpa' or 'eager'"
            )
        self.cache: PagedAttentionCache = of["cache"]
        self.read = {n: of[n] for n in READ if of.get(n) is not None}
        self._places: dict[str, Any] = {name: of.get(name) for name in PLACES}
        self._bounds = of["cu_seq_lens_q"]
        rows = self.rows
        by_layer = self.cache.layer_to_allocator
        self.kinds = tuple(by_layer[i].layer_type for i in range(len(by_layer)))
        lengths = masks if isinstance(masks, dict) else {self.kinds[0]: masks}
        self._past = {kind: mask.shape[-1] - rows for kind, mask in lengths.items()}

    @property
    def rows(self) -> int:
        """Of all requests."""
        return self.read["input_ids"].shape[1]

    def bare(self) -> PagedLayers:
        past = [torch.empty(1, 1, self._past[kind], 0) for kind in sorted(self._past)]
        return PagedLayers(self.kinds, past, map(torch.tensor, range(len(self.kinds))))

    def filling(self) -> AbstractContextManager[None]:
        """The context in which a graph runs."""
        return filling(self, len(self.kinds))

    def update(self, keys: torch.Tensor, values: torch.Tensor, number: int) -> Any:
        made = self.cache.update(keys, values, number, kwargs=dict(self._places))
        if self._past[self.kinds[number]]:
            return made
        # without a past, the rows' own are returned: an operator returns tensors of its own
        own = (t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in made)
        return tuple(t.transpose(1, 2) for t in own)

    # -- the router's state of each request --------------------------------------------------------

    def state_for(self, router: Any) -> PrefixState | None:
        """What each row's request was before these rows, for a router that reads it. Raises InputError
        for a router that would mix requests."""
        require_apart(router)
        if not router.keeps_state:
            return None
        states = vars(self.cache).setdefault(STATES, {})
        before = []
        for slot, _, past in self._requests:
            total, count = states.get(slot, (None, 0)) if past else (None, 0)
            if count != past:
                raise InputError(
                    f"a request continues after {past} positions, of which the router has seen "
                    f"{count}: start continuous batching by the converted model's generate_batch or "
                    "init_continuous_batching, which turn sharing and offloading of pages off"
                )
            before.append((total, count))
        width = next((len(t) for t, _ in before if t is not None), 1)
        device = self._bounds.device
        totals = [torch.zeros(width, device=device) if t is None else t for t, _ in before]
        lengths = torch.tensor([length for _, length, _ in self._requests], device=device)
        rows = torch.repeat_interleave(lengths)
        counts = torch.tensor([float(count) for _, count in before], device=device)
        starts = (lengths.cumsum(0) - lengths)[rows]
        return PrefixState(torch.stack(totals)[rows][None], counts[rows][None], starts=starts[None])

    def keep(self, after: PrefixState | None) -> None:
        """Store the router's state after these rows."""
        if after is None or after.totals is None:
            return
        end, states = 0, vars(self.cache)[STATES]
        for slot, length, past in self._requests:
            end += length
            states[slot] = after.totals[0, end - 1].clone(), past + length

    @cached_property
    def _requests(self) -> list[tuple[int, int, int]]:
        """Of each request (slot of its first position in the pages, rows in this call, positions
        before). Pages are a request's own as long as it runs, and with a window, every position that
        the window divides takes this slot again."""
        bounds = self._bounds.tolist()
        if bounds[-1] != self.rows:
            raise InputError(f"{self.rows} rows, of which {bounds[-1]} belong to requests")
        group: Any = next(iter(self.cache.cache_allocators.values()))
        read, write = (self._places[n][group.index] for n in ("read_index", "write_index"))
        known = self._places["cu_seq_lens_k"][group.layer_type].tolist()
        window = getattr(group, "sliding_window", None)
        past = self.read["position_ids"][0, self._bounds[:-1].long()].tolist()
        found = []
        for begin, end, kept, before in zip(bounds, bounds[1:], known, past, strict=False):
            last = before + end - begin - 1
            at = last - last % window if window else 0
            if at >= before:  # among these rows
                slot = write[begin + at - before]
            else:
                earlier = min(before, window - 1) if window else before
                slot = read[kept + at - before + earlier]
            found.append((int(slot), end - begin, before))
        return found


def is_paged_call(arguments: dict[str, Any]) -> bool:
    return isinstance(arguments.get("cache"), PagedAttentionCache)


def require_apart(router: Any) -> None:
    """Raises InputError for a router by which a request's gates would depend on other requests."""
    if router.mixes_rows and not router.keeps_state:
        raise InputError(
            f"continuous batching with a router that reads whole samples ({router.spec}): requests "
            "lie in one sample, and each would be routed by the others. Convert with "
            "TokenRouter(granularity='prefix') or granularity='token', or call generate(...)"
        )


def _flatten(layers: PagedLayers) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    past = {kind: layer.past for kind, layer in zip(layers.kinds, layers.layers, strict=True)}
    return [
        *(past[kind] for kind in sorted(past)),
        *(la.number for la in layers.layers),
    ], layers.kinds


def _flatten_with_keys(layers: PagedLayers) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    leaves, context = _flatten(layers)
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context


def _unflatten(leaves: Any, kinds: tuple[str, ...]) -> PagedLayers:
    given = list(leaves)
    count = len(set(kinds))
    return PagedLayers(kinds, given[:count], given[count:])


pytree.register_pytree_node(
    PagedLayers, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="moe_rewrite.PagedLayers",
    to_dumpable_context=list, from_dumpable_context=tuple,
)  # fmt: skip
