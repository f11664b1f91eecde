"""A converted model as one function of tensors: shallow blocks, router, gates, deep blocks.

Every weight is an argument, so that a file's initializers bear the state-dict names and tracing
copies none of them; stacks of experts are arguments whose expert dimension stays open.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...converted.bound_graph import Graph
from ...converted.parameters import ADDED
from ...errors import ConfigError
from ...frontend.capture import example_like, is_hf, split_static
from ...frontend.example_inputs import as_arguments
from ...ir.equivalence import evaluating
from ...ir.program import CACHE, Code
from ...ir.structural_key import same_code
from ...routing.plan import PrefixState, RoutingPlan, align
from ...routing.token_gate import TokenGate
from .ffn_placeholder import TracedFeedForward, with_placeholders
from .segments import Part, arranged, traced_target, whole
from .weights import ROWS, tensors_of

if TYPE_CHECKING:
    from ...converted.model import MoEModel

ROUTER = 40  # nodes of a plan, about
STATE = "router"  # prefix of the names of a prefix router's running sums


class Plain(nn.Module):
    """forward(leaves, tensors, state) -> outputs, all of them tensors.

    leaves: the call's tensors, of names `inputs`. tensors: by name, as in `tensors`; stacks: those
    that hold all experts. state: [total (B, D), count (B,)] of a prefix router where the model is
    exported with its cache, else []; the state after the call is put behind the outputs then.
    outputs: names. example: leaves of sizes that a trace does not confuse. open: per leaf, the
    dimensions that differ from call to call. mask: name of the input that says which rows count.
    biased: a router's row ends in a bias. calls: of feed-forward regions, placeholders in a trace.
    parts: what is done, in order, from the values of names `given`: leaves, and state as `past`.
    """

    def __init__(
        self, moe: MoEModel, example_inputs: Any = None, cache: bool = False,
        open_experts: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        with evaluating(moe):
            self.arguments = _arguments(moe, example_inputs, cache)
            self.graph, _ = moe._graph(self.arguments)
        traced, _ = split_static(self.arguments)
        self.example = [t.detach() for t in pytree.tree_leaves(example_like(traced))]
        self.inputs = _input_names(traced)
        self.kept, self.outputs = _outputs(self.graph)
        closed = {(i, d) for i, d, _ in self.graph.static}
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
        self.biased = isinstance(moe.router, TokenGate)
        self.with_state = cache and getattr(moe.router.spec, "granularity", "") == "prefix"
        sums = [f"{STATE}.total", f"{STATE}.count"] if self.with_state else []
        self.past, after = ([f"{when}_{name}" for name in sums] for when in ("past", "present"))
        self.given = [*self.graph.leaves, *self.past]
        self.outputs += after
        self.kept += after
        self._single = list(self._parts(after))
        self.parts = arranged(self._single, self.kept)

    def require_open(self) -> None:
        """Raises ConfigError where the number of experts is fixed in the graph."""
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
        for part in self.parts:
            part(tensors, values)
        return [values[name] for name in self.kept]

    def as_one(self) -> None:
        """Make of its parts one."""
        self.parts = whole(self._single, self.kept)

    def values(self, leaves: list[torch.Tensor], state: list[torch.Tensor]) -> dict[str, Any]:
        """What the parts begin with, by name."""
        return dict(zip(self.given, [*leaves, *state], strict=True))

    def _parts(self, after: list[str]) -> Iterator[Part]:
        """after: names of the router's state behind the call."""
        graph, routed = self.graph, False
        for step in (bound.step for _, bound in graph.steps):
            if step.deep and not routed:
                mask = [self.mask] if self.mask in graph.leaves else []
                own = {n: n for n in self.tensors if n.startswith(f"{ADDED}router.")}
                gives = (*(name for name, _ in graph.emitted.layouts), *after)
                takes = (graph.emitted.cut, *mask, *self.past)
                yield Part("router", own, takes, gives, self._routed, object(), ROUTER)
                routed = True
            first = len(self.calls)
            code = with_placeholders(step.code, step.owned, self.calls)
            owned = tuple(self._owned(*names) for names in step.owned)
            names = [n for n in pytree.tree_leaves(owned) if isinstance(n, str)]
            yield Part(
                step.block, owned, step.takes, step.gives, partial(_run, code),
                (same_code(code.module.graph, traced_target), *(self.tensors[n].shape for n in names)),
                len(code.module.graph.nodes) - len(step.owned),
                tuple(i - len(owned) for i in step.writes if i >= len(owned)),
                tuple(range(first, len(self.calls))),
            )  # fmt: skip

    def state(self, batch: int) -> list[torch.Tensor]:
        """The running sums of a prefix router before the first position."""
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
        """The plan as the sites take it, and the router's state behind it."""
        features, *others = taken
        mask = others.pop(0) if self.mask in self.graph.leaves else None
        plan, after = self._plan(features, mask, tensors, PrefixState(*others) if others else None)
        aligned = [align(plan, layout) for _, layout in self.graph.emitted.layouts]
        return [*aligned, after.total, after.count] if self.with_state else aligned

    def _plan(
        self, features: torch.Tensor, mask: Any, tensors: dict[str, torch.Tensor], before: Any
    ) -> tuple[RoutingPlan, Any]:
        """The router's plan with rows and tables taken from `tensors`.

        Top-k is taken over columns of minus infinity as well, so that it is there for any number
        of experts.
        """
        gate: Any = copy.copy(self._held[0])
        own = gate.__dict__
        own["_buffers"] = {
            n: tensors.get(f"{ADDED}router.{n}", b) for n, b in gate._buffers.items()
        }
        own["active_indices"] = lambda: self.active
        if self.active:
            own["stacked"] = lambda active: tensors[ROWS]
        own["_few_matter"] = lambda count: False  # that is for a backward pass
        top_k = getattr(gate.spec, "top_k", None)
        if not (isinstance(gate, TokenGate) and top_k and self.stacks):
            return gate.forward(features, mask, before)
        logits_of = gate._logits

        def padded(read: torch.Tensor, active: tuple[int, ...]) -> torch.Tensor:
            logits = logits_of(read, active)
            none = logits.new_full((*logits.shape[:-1], top_k), float("-inf"))
            return torch.cat([logits, none], dim=-1)

        own["_logits"] = padded
        plan, after = gate.forward(features, mask, before)
        return replace(plan, weights=plan.weights[..., : tensors[ROWS].shape[0]]), after


def _run(code: Code, owned: Any, taken: list[Any]) -> Any:
    return code.call(*owned, *taken)


def _arguments(moe: MoEModel, example_inputs: Any, cache: bool) -> dict[str, Any]:
    host = moe._compiler.host
    arguments = as_arguments(host, example_inputs)
    if is_hf(host):
        from ...frontend.huggingface import without_cache

        arguments = without_cache(host, arguments) | ({"use_cache": True} if cache else {})

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(moe.dtype) if t.is_floating_point() else t

    return moe._arguments((), pytree.tree_map_only(torch.Tensor, cast, arguments))[0]


def _input_names(traced: dict[str, Any]) -> list[str]:
    """``name`` of a tensor, ``name.0.key`` of a cache's, ``name.0`` of those in a container."""
    names = []
    for name, given in traced.items():
        count = len(pytree.tree_leaves(given))
        if name == CACHE:
            names += _cache_names(CACHE, count)
        elif isinstance(given, torch.Tensor):
            names.append(name)
        else:
            names += [f"{name}.{i}" for i in range(count)]
    return names


def _cache_names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i // 2}.{('key', 'value')[i % 2]}" for i in range(count)]


def _outputs(graph: Graph) -> tuple[list[str], list[str]]:
    """The values that are handed back as tensors, and the names of the output's fields."""
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
