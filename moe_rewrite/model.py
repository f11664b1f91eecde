"""The converted model: calls like the one it came from, and grows experts."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .blocks import SEPARATOR, Block, Bound, Ref, Segment
from .capture import bind, canonical_names, is_hf, split_static
from .compiler import Compiler, device_and_dtype
from .errors import ConfigError, EquivalenceError, InputError
from .experts import LoRASite
from .passes.emit import Emitted, Step
from .program import Program, value
from .routing import PrefixState, Router, RoutingPlan, align


@dataclass
class Original:
    """Holds the dense model outside the module tree; a deep copy keeps the same one."""

    model: nn.Module

    def __deepcopy__(self, memo: dict) -> Original:
        return self


@dataclass
class Graph:
    """One compiled signature, bound to a model's blocks.

    names: traced arguments in order; leaves: value names of their tensors; static: (leaf, dim,
    size) that must hold; ties: dimensions that must agree, by symbol.
    """

    names: tuple[str, ...]
    leaves: tuple[str, ...]
    static: tuple[tuple[int, int, int], ...]
    ties: tuple[tuple[tuple[int, int], ...], ...]
    emitted: Emitted
    bound: tuple[Bound, ...]
    blocks: tuple[Block, ...]
    out_spec: Any
    cache_at: tuple[int, int] | None
    checked: set = field(default_factory=set)
    refused: set = field(default_factory=set)

    def __deepcopy__(self, memo: dict) -> Graph:
        """The copy runs the same code on the copied model's blocks."""
        bound, blocks = (
            tuple(Bound(b.step, copy.deepcopy(b.refs, memo)) for b in self.bound),
            copy.deepcopy(self.blocks, memo),
        )
        return replace(
            self, bound=bound, blocks=blocks, checked=set(self.checked), refused=set(self.refused)
        )

    def accepts(self, leaves: list[torch.Tensor]) -> bool:
        fits = all(leaves[i].shape[d] == size for i, d, size in self.static)
        return fits and ones(leaves) not in self.refused

    def check(self, leaves: list[torch.Tensor]) -> None:
        for group in self.ties:
            (i, d), *others = group
            for j, e in others:
                if leaves[i].shape[d] != leaves[j].shape[e]:
                    raise InputError(
                        f"{self.leaves[j]} has shape {tuple(leaves[j].shape)}: dimension {e} "
                        f"should be {leaves[i].shape[d]}, as dimension {d} of {self.leaves[i]}"
                    )


def ones(leaves: list[torch.Tensor]) -> tuple:
    """Which sizes are 0 or 1: those that a captured graph might have treated as constants."""
    return tuple(tuple(min(s, 2) for s in t.shape) for t in leaves)


class MoEModel(nn.Module):
    """What `convert` returns. `shallow`, `router`, `deep` are its parts; `report` says what was
    done. Calls take the original's arguments and give its outputs."""

    def __init__(
        self, model: nn.Module, compiler: Compiler, program: Program, emitted: Emitted,
        report: Any, checked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self._original, self._compiler, self.report = Original(model), compiler, report
        self._checked, self._graphs, self._refs = checked, {}, {}
        self._signature = inspect.signature(compiler.host.forward)
        self._checkpointing, self._cache_format = False, None
        self.names: list[str] = []
        self._own(program, emitted)
        features = value(program.node(program.cut.node))  # type: ignore[union-attr]
        width = int(features.shape[1] if features.ndim == 4 else features.shape[-1])
        self.router = Router(compiler.router, width, self.device)  # type: ignore[arg-type]
        self._add(compiler.recipe.num_experts, [None] * compiler.recipe.num_experts, active=True)

    # -- ownership ------------------------------------------------------------------------------

    def _own(self, program: Program, emitted: Emitted) -> None:
        """Give every dense tensor to the first block that uses it, every site to its block."""
        host, r = self._compiler.host, self._compiler.recipe.experts.rank
        kept = {k: id(v) for k, v in host.state_dict(keep_vars=True).items()}
        tensors = dict([*host.named_parameters(), *host.named_buffers()])
        sites = {s.name: s for s in program.sites}
        halves: dict[bool, list[Block]] = {False: [], True: []}
        self._sites: dict[str, LoRASite] = {}
        for step in emitted.steps:
            block = Block(step.block)
            halves[step.deep].append(block)
            for kind, name in step.owned:
                if kind in ("weight", "buffer") and name not in self._refs:
                    self._put(block, name, tensors[name], name in kept)
                elif kind == "expert" and (site := name.rpartition(":")[0]) not in self._sites:
                    self._sites[site] = LoRASite(sites[site], r)
                    block.add_site(self._sites[site])
        self.shallow, self.deep = Segment(halves[False]), Segment(halves[True])
        self.rest = Block("unused by the graph")
        for name, tensor in tensors.items():
            if name not in self._refs:
                self._put(self.rest, name, tensor, name in kept)
        self._aliases = {k: v for k, v in canonical_names(host).items() if k != v and k in kept}
        self._register_state_dict_hook(_to_public)
        self._register_load_state_dict_pre_hook(self._to_private)

    def _put(self, block: Block, name: str, tensor: torch.Tensor, persistent: bool) -> None:
        block.weights.put(name, tensor, persistent)
        table = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        self._refs[name] = Ref(block.weights, table, name.replace(".", SEPARATOR))

    def _sync_host(self) -> None:
        """Let the host show this model's tensors as they are now (after a move or a cast)."""
        host = self._compiler.host
        canonical = canonical_names(host)
        for name, first in canonical.items():
            parent, _, leaf = name.rpartition(".")
            module = host.get_submodule(parent)
            table = module._parameters if leaf in module._parameters else module._buffers
            table[leaf] = self._refs[first].get()

    # -- compiling and running ------------------------------------------------------------------

    def adopt(self, arguments: dict[str, Any], program: Program, emitted: Emitted) -> Graph:
        """Bind a compiled program to the blocks and keep it for calls of its signature."""
        traced, _ = split_static(arguments)
        nodes = program.leaves()
        static, ties = [], {}
        for i, node in enumerate(nodes):
            for d, size in enumerate(value(node).shape):
                if isinstance(size, int):
                    static.append((i, d, size))
                elif not node.name.startswith("past_key_values"):
                    ties.setdefault(str(size), []).append((i, d))
        for step in emitted.steps:
            self._unshare(step)
        blocks = self._blocks_for(emitted)
        bound = tuple(
            Bound(s, tuple(self._ref(emitted, *o) for o in s.owned)) for s in emitted.steps
        )
        spec, at = _without_cache(program.out_spec)
        graph = Graph(
            tuple(traced), tuple(n.name for n in nodes), tuple(static),
            tuple(tuple(t) for t in ties.values() if len(t) > 1), emitted, bound, blocks, spec, at,
        )  # fmt: skip
        mode = program.mode
        self._graphs.setdefault(self._key(arguments, mode), []).append(graph)
        return graph

    def _blocks_for(self, emitted: Emitted) -> tuple[Block, ...]:
        by_name = {
            (b.name, deep): b for deep, s in ((False, self.shallow), (True, self.deep)) for b in s
        }
        return tuple(by_name.get((s.block, s.deep), self.rest) for s in emitted.steps)

    def _ref(self, emitted: Emitted, kind: str, name: str) -> Any:
        if kind == "expert":
            site, _, part = name.rpartition(":")
            return (self._sites[site], 0 if part == "a" else 1)
        return emitted.constants[name] if kind == "constant" else self._refs[name]

    def _unshare(self, step: Step) -> None:
        """A buffer that training writes gets storage of its own: the original must not change."""
        for i in step.writes:
            if i < len(step.owned) and step.owned[i][0] == "buffer":
                ref, name = self._refs[step.owned[i][1]], step.owned[i][1]
                theirs = dict(self._original.model.named_buffers()).get(name)
                if theirs is not None and theirs.data_ptr() == ref.get().data_ptr():
                    ref.set(ref.get().clone())

    def _key(self, arguments: dict[str, Any], mode: str) -> tuple:
        traced, static = split_static(arguments)
        kinds = tuple(
            (n, tuple((t.dtype, t.ndim) for t in pytree.tree_leaves(v)) if isinstance(v, torch.Tensor)
             else type(v).__name__)
            for n, v in traced.items()
        )  # fmt: skip
        return (
            mode,
            device_and_dtype(self),
            kinds,
            tuple(sorted((k, repr(v)) for k, v in static.items())),
        )

    def _graph(self, arguments: dict[str, Any], leaves: list[torch.Tensor]) -> Graph:
        mode = "train" if self.training else "eval"
        kept = self._graphs.get(self._key(arguments, mode), [])
        graph = next((g for g in kept if g.accepts(leaves)), None)
        if graph is None:
            graph = self._compile(
                arguments, mode, static_ones=any(ones(leaves) in g.refused for g in kept)
            )
        graph.check(leaves)
        pattern = ones(leaves)
        if mode == "eval" and self._checked and pattern not in graph.checked:
            graph.checked.add(pattern)
            if not self._matches_dense(graph, arguments, leaves):
                graph.refused.add(pattern)
                graph = self._compile(arguments, mode, static_ones=True)
                if not self._matches_dense(graph, arguments, leaves):
                    raise EquivalenceError(
                        f"the graph captured for {sorted(arguments)} differs from the original on "
                        "these inputs: please report this model, or convert with verify=False"
                    )
                graph.checked.add(pattern)
        return graph

    def _compile(self, arguments: dict[str, Any], mode: str, static_ones: bool = False) -> Graph:
        self._sync_host()
        return self.adopt(arguments, *self._compiler.compile(arguments, mode, static_ones))

    def _matches_dense(self, graph: Graph, arguments: dict[str, Any], leaves: list) -> bool:
        from .verify import compare

        self._sync_host()
        with torch.no_grad(), self._compiler.as_in("eval"):
            given = {k: _fresh(v) for k, v in arguments.items()}
            dense = self._compiler.host(**given)
            ours, _, _ = self._run(graph, leaves, None, dense=True)
        return compare(pytree.tree_leaves(dense), ours, arguments.get("attention_mask")).equal

    def _run(
        self, graph: Graph, leaves: list, state: PrefixState | None, dense: bool = False
    ) -> tuple[list, RoutingPlan, PrefixState | None]:
        """All outputs of the graph, the plan, and the router's state behind these positions."""
        values: dict[str, Any] = dict(zip(graph.leaves, leaves, strict=True))
        mask = values.get("attention_mask")
        active: tuple[int, ...] = ()
        plan, after = None, None
        for bound, block in zip(graph.bound, graph.blocks, strict=True):
            step = bound.step
            if step.deep and plan is None:
                plan, after = self._plan(values[graph.emitted.cut], mask, state, dense)
                active = plan.active
                for name, layout in graph.emitted.layouts:
                    values[name] = align(plan, layout)
            taken = [values[n] for n in step.takes]
            run = (
                block.checkpointed if self._checkpointing and step.deep and self.training else block
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and step.deep):
                given = run(bound, active, *taken)
            values.update(zip(step.gives, given, strict=True))
            for name in step.drops:
                values.pop(name, None)
        outputs = [values[o] if isinstance(o, str) else o.value for o in graph.emitted.outputs]
        assert plan is not None
        return outputs, plan, after

    def _plan(self, features: Any, mask: Any, state: Any, dense: bool) -> Any:
        experts = self._compiler.recipe.experts
        if dense:
            lead = tuple(features.shape[:-1]) if features.ndim < 4 else tuple(features.shape[:1])
            rows = (
                lead
                if self.router.spec.granularity != "sequence" or len(lead) == 1
                else (lead[0], 1)
            )
            empty = features.new_zeros(*rows, 0, dtype=torch.float32)
            return RoutingPlan(
                (), empty, None, len(self.router), lead, (experts.rank, experts.scale)
            ), state
        return self.router(features, mask, state, (experts.rank, experts.scale))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call; see its documentation for arguments and outputs."""
        if self.training:
            self.router.activate_pending()
        arguments, cache = self._arguments(args, kwargs)
        graph, leaves, state = self._prepare(arguments, cache)
        outputs, _, after = self._run(graph, leaves, state)
        if cache is None:
            return pytree.tree_unflatten(outputs, graph.out_spec)
        from .hf import fill_cache, router_state

        start, stop = graph.cache_at  # type: ignore[misc]
        if after is not None:
            keeper = router_state(cache)
        fill_cache(cache, outputs[start:stop])
        if after is not None:
            keeper.store(after.total, after.count, outputs[start].shape[2])
        return pytree.tree_unflatten([*outputs[:start], cache, *outputs[stop:]], graph.out_spec)

    def route(self, *args: Any, **kwargs: Any) -> RoutingPlan:
        """The RoutingPlan for these inputs; its gates are differentiable where grad is enabled."""
        arguments, cache = self._arguments(args, kwargs)
        graph, leaves, state = self._prepare(arguments, cache)
        return self._run(graph, leaves, state)[1]

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Arguments by name, and the key-value cache where this call keeps one."""
        host = self._compiler.host
        arguments = bind(self._signature, type(host).__name__, args, kwargs)
        if not is_hf(host):
            return arguments, None
        from .hf import CACHE, KNOWN_KWARGS, CacheFormat, default_use_cache, is_causal_lm

        unknown = set(arguments) - set(self._signature.parameters) - KNOWN_KWARGS
        if unknown:
            raise InputError(
                f"{type(host).__name__} takes no argument {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(p for p in self._signature.parameters if p != 'kwargs')}"
            )

        if not is_causal_lm(host):
            return arguments, None
        wanted = arguments.pop("use_cache", default_use_cache(host) and not self.training)
        cache = arguments.pop(CACHE, None)
        if not wanted and cache is None:
            return arguments | {"use_cache": False}, None
        current = device_and_dtype(self)
        if self._cache_format is None or self._cache_format[0] != current:
            self._sync_host()
            with self._compiler.as_in("eval"):
                self._cache_format = current, CacheFormat(host)
        main = arguments.get("input_ids", arguments.get("inputs_embeds"))
        if main is None:
            raise InputError("pass input_ids or inputs_embeds")
        cache = self._cache_format[1].adopt(cache, main.shape[0])
        return arguments | {"use_cache": True}, cache

    def _prepare(self, arguments: dict[str, Any], cache: Any) -> tuple:
        state = None
        if cache is not None:
            from .hf import CACHE, bare_cache, cache_leaves, router_state

            arguments = arguments | {CACHE: bare_cache(cache)}
            if self.router.spec.granularity == "prefix":
                kept = router_state(cache)
                if kept.total is not None and kept.count is not None:
                    state = PrefixState(kept.total, kept.count)
        leaves: list[torch.Tensor] = []
        traced, _ = split_static(arguments) if cache is None else (arguments, None)
        for name, given in traced.items():
            if isinstance(given, torch.Tensor):
                leaves.append(given)
            elif cache is not None and name == "past_key_values":
                leaves.extend(cache_leaves(cache))
            elif cache is None:
                leaves.extend(pytree.tree_leaves(given))
        return self._graph(arguments, leaves), leaves, state

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate() on the converted graphs, with its arguments."""
        host = self._compiler.host
        if not is_hf(host) or not hasattr(host, "generate"):
            raise InputError(f"{type(host).__name__} has no generate()")
        from .hf import is_causal_lm

        if not is_causal_lm(host):
            raise InputError("generate() is there for decoder-only language models")
        self._sync_host()
        with self._as_forward():
            return host.generate(*args, **kwargs)

    @contextmanager
    def _as_forward(self) -> Iterator[None]:
        """Let the host's forward be this model's, unless the host itself is being captured."""
        host = self._compiler.host
        dense = host.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            host.__dict__.pop("forward", None)
            try:
                return self(*args, **kwargs)
            finally:
                host.forward = forward

        forward.__signature__ = inspect.signature(dense)  # type: ignore[attr-defined]
        host.forward = forward
        try:
            yield
        finally:
            host.__dict__.pop("forward", None)

    # -- experts --------------------------------------------------------------------------------

    @property
    def num_experts(self) -> int:
        return len(self.router)

    def _add(self, n: int, names: list, active: bool) -> list[nn.Parameter]:
        new = self.router.add(n, active)
        for name, ref in ((s, self._refs[site.site.weight]) for s, site in self._sites.items()):
            for _ in range(n):
                new += self._sites[name].add(ref.get())
        for name in names:
            self.names.append(name or f"expert{len(self.names)}")
        return new

    def expand(self, n: int = 1, name: str | None = None) -> list[nn.Parameter]:
        """Add n experts, freeze the older ones, and return the new parameters.

        The new ones are off, so no output changes, until `activate(name)` or the first forward
        in training mode. Rows of the router stay trainable.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n={n!r}: expected an int >= 1")
        names = [name if n == 1 else f"{name}.{i}" for i in range(n)] if name else [None] * n
        taken = [x for x in names if x in self.names]
        if taken:
            raise ConfigError(f"name={taken[0]!r}: there is an expert of this name; choose another")
        for site in self._sites.values():
            site.freeze()
        return self._add(n, names, active=False)

    def _index(self, name: str | int) -> int:
        if isinstance(name, int) and 0 <= name < len(self.names):
            return name
        if name not in self.names:
            raise ConfigError(f"expert {name!r}: expected one of {self.names}")
        return self.names.index(name)  # type: ignore[arg-type]

    def activate(self, name: str | int) -> None:
        self.router.set_active(self._index(name), True)

    def deactivate(self, name: str | int) -> None:
        self.router.set_active(self._index(name), False)

    def remove_last(self) -> None:
        """Remove the newest expert; the router is bitwise what it was before it came."""
        if self.num_experts <= 1:
            raise ConfigError("the only expert cannot be removed: use to_dense()")
        self.router.remove_last()
        self.names.pop()
        for site in self._sites.values():
            site.remove_last()
            site.thaw_last()

    def to_dense(self) -> nn.Module:
        """The original model, which conversion never touched."""
        return self._original.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def print_trainable_parameters(self) -> None:
        trainable, total = (
            sum(p.numel() for p in self.trainable_parameters()),
            sum(p.numel() for p in self.parameters()),
        )
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    # -- what people expect ---------------------------------------------------------------------

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute each deep block in the backward pass (non-reentrant)."""
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self._checkpointing = False

    @property
    def config(self) -> Any:
        return getattr(self._compiler.host, "config", None)

    @property
    def device(self) -> torch.device:
        return device_and_dtype(self)[0]

    @property
    def dtype(self) -> torch.dtype:
        return device_and_dtype(self)[1]

    def train(self, mode: bool = True) -> MoEModel:
        super().train(mode)
        self.shallow.train(False)
        return self

    def save_pretrained(self, folder: Any) -> None:
        """Write what was added (experts, router, recipe) as safetensors and JSON."""
        from .checkpoint import save

        save(self, folder)

    def _to_private(self, module: Any, state: dict, prefix: str, *rest: Any) -> None:
        public = {_public(k[len(prefix) :]): k for k in self._private_keys(prefix)}
        for key in [k for k in state if k.startswith(prefix)]:
            name = key[len(prefix) :]
            if name in self._aliases:
                state.pop(key)
            elif name in public:
                state[public[name]] = state.pop(key)

    def _experts_and_router(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything conversion added, under its public state-dict name."""
        for key, tensor in (*self.named_parameters(), *self.named_buffers()):
            if _public(key).startswith("moe_rewrite."):
                yield _public(key), tensor

    def _private_keys(self, prefix: str) -> list[str]:
        keys = [n for n, _ in self.named_parameters()] + [n for n, _ in self.named_buffers()]
        return [prefix + k for k in keys]


def _public(key: str) -> str:
    """An internal state-dict key as users see it: the original's, or one under moe_rewrite."""
    for part, added in ((".weights.", ""), (".experts.", "moe_rewrite.experts.")):
        if part in key:
            return added + key.split(part, 1)[1].replace(SEPARATOR, ".")
    return "moe_rewrite." + key


def _to_public(module: MoEModel, state: OrderedDict, prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + _public(key[len(prefix) :])] = state.pop(key)
    for alias, name in module._aliases.items():
        state[prefix + alias] = state[prefix + name]


def _fresh(given: Any) -> Any:
    """A cache that the dense model may write into; other arguments as they are."""
    if type(given).__name__ != "DynamicCache":
        return given
    return copy.deepcopy(given)


def _without_cache(spec: Any) -> tuple[Any, tuple[int, int] | None]:
    """The output's structure with a cache as one leaf, and the leaves that the cache had."""
    at: list[tuple[int, int]] = []

    def walk(spec: Any, start: int) -> Any:
        if spec.is_leaf():
            return spec
        if getattr(spec.type, "__name__", "") == "DynamicCache":
            at.append((start, start + spec.num_leaves))
            return pytree.treespec_leaf()
        children = []
        for child in spec.children():
            children.append(walk(child, start))
            start += child.num_leaves
        return pytree.TreeSpec(spec.type, spec.context, children)

    return walk(spec, 0), (at[0] if at else None)
