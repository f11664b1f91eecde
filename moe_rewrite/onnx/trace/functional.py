"""A converted model as one function of tensors: shallow blocks, router, gates, deep blocks.

Every weight is an argument, so that a file's initializers have the state-dict names and tracing
copies none of them; stacks of experts are arguments whose expert dimension is dynamic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...converted.graphs.bound_graph import BoundGraph
from ...converted.saving.state_dict import ADDED
from ...errors import ConfigError
from ...frontend.arguments import is_cache, split_static
from ...frontend.capture import example_like
from ...ir.equivalence import evaluating
from ...ir.program import Code
from ...ir.structural_key import structural_key
from ...routing.plan import PrefixState, RoutingPlan
from ...routing.router import GivenRows
from .ffn_placeholder import TracedFeedForward, with_placeholders
from .segments import Segment, as_one_segment, merge_small, traced_target
from .weights import ROWS, tensors_of

if TYPE_CHECKING:
    from ...converted.model import MoEModel

ROUTER = 40  # nodes of the router's segment, about
STATE = "router"  # prefix of the names of a prefix router's running sums


class FunctionalModel(nn.Module):
    """forward(leaves, tensors, state) -> outputs, all of them tensors.

    leaves: the call's tensors, whose names are in `inputs`.
    tensors: weights and buffers by name, as in the attribute `tensors`.
    state: [total (B, D), count (B,)] of a prefix router if the model is exported with its cache,
        else []; the state after the call is then appended to the outputs.

    example: leaves with sizes that a trace does not confuse.
    cached: for each leaf, whether it is part of a key-value cache.
    open: for each leaf, its dynamic dimensions.
    mask: name of the input that says which rows count, or None.
    stacks: the tensors that hold all experts.
    biased: a router's row ends in a bias.
    calls: of feed-forward regions, which are placeholders in a trace.
    given, past: names of what the segments start from: leaves and state; the state.
    segments: what is computed, in order.
    kept, outputs: names of the values that are returned, in the graph and in the file.
    """

    def __init__(
        self, moe: MoEModel, example_inputs: Any = None, cache: bool = False,
        open_experts: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        with evaluating(moe):
            self.arguments = _arguments(moe, example_inputs, cache)
            self.graph = _graph_for_any_size(moe, self.arguments)
        if self.graph.emitted.tables and moe.router.mixes_rows:
            raise ConfigError(
                "with these arguments attention stops within samples (packed documents), which a "
                "file's router cannot follow: export with an attention_mask (batch, length) and no "
                "position_ids, or convert with TokenRouter(granularity='token')"
            )
        traced, _ = split_static(self.arguments)
        self.example = [t.detach() for t in pytree.tree_leaves(example_like(traced))]
        self.inputs = _input_names(traced)
        self.cached = [is_cache(v) for v in traced.values() for _ in pytree.tree_leaves(v)]
        self.kept, self.outputs = _outputs(self.graph)
        closed = self.graph.conditions.constant
        self.open = [
            [d for d in range(t.ndim) if (i, d) not in closed] for i, t in enumerate(self.example)
        ]
        self.mask = self.graph.emitted.mask
        self.calls: list[TracedFeedForward] = []
        self.active = moe.router.active_indices()
        self._held = (moe.router,)  # in a tuple: its parameters are not this module's
        self.tensors, self.stacks, self._experts = tensors_of(
            moe, self.graph, self.active, open_experts
        )
        taken = {*self.inputs, *self.tensors}  # a weight may be called as an output is
        self.outputs = [f"{name}.out" if name in taken else name for name in self.outputs]
        self.biased = moe.router.biased
        self.with_state = cache and moe.router.keeps_state
        sums = [f"{STATE}.total", f"{STATE}.count"] if self.with_state else []
        self.past, after = ([f"{when}_{name}" for name in sums] for when in ("past", "present"))
        self.given = [*self.graph.conditions.leaves, *self.past]
        self.outputs += after
        self.kept += after
        self._single = list(self._segments(after))
        self.segments = merge_small(self._single, self.kept)

    @property
    def largest(self) -> dict[str, dict[int, int]]:
        """By input, its dimensions that are bounded in the graph, with their largest size."""
        found: dict[str, dict[int, int]] = {}
        for (leaf, dim), size in self.graph.conditions.largest.items():
            found.setdefault(self.inputs[leaf], {})[dim] = size
        return found

    def require_open(self) -> None:
        """Raises ConfigError if the number of experts is fixed in the graph."""
        if not self.stacks:
            raise ConfigError(
                "the number of these experts is fixed in the graph (none is on, or they are of a "
                "region or widen a head): write the whole model with export_onnx()"
            )

    def forward(
        self, leaves: list[torch.Tensor], tensors: dict[str, torch.Tensor],
        state: list[torch.Tensor],
    ) -> list[torch.Tensor]:  # fmt: skip
        values = self.values(leaves, state)
        for segment in self.segments:
            segment(tensors, values)
        return [values[name] for name in self.kept]

    def as_one(self) -> None:
        """Merge the segments into one."""
        self.segments = as_one_segment(self._single, self.kept)

    def values(self, leaves: list[torch.Tensor], state: list[torch.Tensor]) -> dict[str, Any]:
        """What the segments start from, by name."""
        return dict(zip(self.given, [*leaves, *state], strict=True))

    def _segments(self, after: list[str]) -> Iterator[Segment]:
        """after: names of the router's state after the call."""
        graph, routed = self.graph, False
        for step in (bound.step for _, bound in graph.steps):
            if step.deep and not routed:
                mask = [self.mask] if self.mask in graph.conditions.leaves else []
                own = {n: n for n in self.tensors if n.startswith(f"{ADDED}router.")}
                gives = (*(name for name, _ in graph.emitted.views), *after)
                takes = (graph.emitted.cut, *mask, *self.past)
                yield Segment("router", own, takes, gives, self._routed, object(), ROUTER)
                routed = True
            first = len(self.calls)
            code = with_placeholders(step.code, step.owned, self.calls)
            owned = tuple(self._owned(*names) for names in step.owned)
            names = [n for n in pytree.tree_leaves(owned) if isinstance(n, str)]
            yield Segment(
                step.block, owned, step.takes, step.gives, partial(_run, code),
                (structural_key(code.module.graph, traced_target), *(self.tensors[n].shape for n in names)),
                len(code.module.graph.nodes) - len(step.owned),
                tuple(i - len(owned) for i in step.writes if i >= len(owned)),
                tuple(range(first, len(self.calls))),
            )  # fmt: skip

    def state(self, batch: int) -> list[torch.Tensor]:
        """The running sums of a prefix router before the first position, [] without."""
        if not self.with_state:
            return []
        router = self._held[0]
        width = getattr(router, "lift", torch.empty(0, router.size - 1)).shape[1]
        return [torch.zeros(batch, width), torch.zeros(batch)]

    def _owned(self, kind: str, name: str) -> Any:
        if kind == "constant":
            return self.graph.emitted.constants[name]
        return self._experts[name] if kind == "expert" else name

    def _routed(self, tensors: dict[str, torch.Tensor], taken: list[Any]) -> list[Any]:
        """The views of the plan that the sites take, then the router's state after the call."""
        features, *others = taken
        mask = others.pop(0) if self.mask in self.graph.conditions.leaves else None
        plan, after = self._plan(features, mask, tensors, PrefixState(*others) if others else None)
        aligned = [view.of(plan) for _, view in self.graph.emitted.views]
        return [*aligned, after.total, after.count] if self.with_state else aligned

    def _plan(
        self, features: torch.Tensor, mask: Any, tensors: dict[str, torch.Tensor], before: Any
    ) -> tuple[RoutingPlan, Any]:
        """The router's plan, with rows and tables taken from `tensors`."""
        (router,) = self._held
        prefix = f"{ADDED}router."
        tables = {
            name: tensors[prefix + name]
            for name, _ in router.named_buffers()
            if prefix + name in tensors
        }
        given = GivenRows(self.active, tensors.get(ROWS), open=bool(self.stacks))
        return functional_call(router, tables, (features, mask, before, given))


def _run(code: Code, owned: Any, taken: list[Any]) -> Any:
    return code.call(*owned, *taken)


def _arguments(moe: MoEModel, example_inputs: Any, cache: bool) -> dict[str, Any]:
    arguments = moe.host.arguments(example_inputs)
    if cache:
        arguments = moe.host.with_new_cache(arguments)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(moe.dtype) if t.is_floating_point() else t

    return moe.normalized((), pytree.tree_map_only(torch.Tensor, cast, arguments))[0]


def _graph_for_any_size(moe: MoEModel, arguments: dict[str, Any]) -> BoundGraph:
    """The graph for a call like this one without sizes of 0 and 1, which could be constants."""
    traced, static = split_static(arguments)
    general = example_like(traced)
    masks = {n: torch.ones_like(t) for n, t in general.items() if "mask" in n}
    return moe.graph_for(general | masks | static)[0]


def _input_names(traced: dict[str, Any]) -> list[str]:
    """``name`` for a tensor, ``name.0`` for one in a container, ``past_key_values.0.key`` for a cache,
    whatever transformers calls it."""
    names = []
    for name, given in traced.items():
        count = len(pytree.tree_leaves(given))
        if is_cache(given):
            names += _cache_names("past_key_values", count)
        elif isinstance(given, torch.Tensor):
            names.append(name)
        else:
            names += [f"{name}.{i}" for i in range(count)]
    return names


def _cache_names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i // 2}.{('key', 'value')[i % 2]}" for i in range(count)]


def _outputs(graph: BoundGraph) -> tuple[list[str], list[str]]:
    """Names of the values that are returned as tensors, and names of the output's fields."""
    made = list(graph.emitted.outputs)
    fields: list[str] = []
    if graph.cache_at is not None:
        start, stop = graph.cache_at
        made[start:stop] = [None]
    structure = pytree.tree_unflatten(list(range(len(made))), graph.out_spec)
    for path, _ in _with_path(structure):
        fields.append(".".join(path) or "output")
    if graph.cache_at is not None:
        fields[start : start + 1] = _cache_names("present", stop - start)
    pairs = [
        (o, f) for o, f in zip(graph.emitted.outputs, fields, strict=True) if isinstance(o, str)
    ]
    return [o for o, _ in pairs], [f for _, f in pairs]


def _with_path(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Leaves in pytree order, each with the keys that lead to it."""
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [((), value)] if value is not None else []
    return [((key, *path), leaf) for key, v in items for path, leaf in _with_path(v)]
