"""The converted model: calls like the one it came from, and grows experts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..config import LoRAExperts, Recipe
from ..errors import CheckpointError, ConfigError, InputError
from ..experts.lora import peft
from ..frontend.capture import bind, is_hf, split_static
from ..frontend.example_inputs import as_arguments
from ..ir.aten import value
from ..ir.program import CACHE, Program
from ..ir.steps import Emitted
from ..passes.pipeline import Compiler, device_and_dtype
from ..routing.plan import Planner, PrefixState, RoutingPlan
from ..routing.ridge_gate import AnalyticGate
from ..routing.select import make_router
from . import checkpoint
from .bound_graph import Graph
from .expert_set import Growing
from .graph_cache import Graphs
from .parameters import ADDED, Ownership, added_tensors, state_to_private, state_to_public
from .report import Report

DENSE = ADDED + "dense."  # dense tensors that training may have changed


@dataclass
class Original:
    """Holds the dense model outside the module tree; a deep copy keeps the same one."""

    model: nn.Module

    def __deepcopy__(self, memo: dict) -> Original:
        return self


class MoEModel(Growing):
    """What `convert` returns. `shallow`, `router`, `deep` are its parts; `report` says what was
    done. Calls take the original's arguments and give its outputs."""

    def __init__(
        self, model: nn.Module, compiler: Compiler, program: Program, emitted: Emitted,
        report: Report, checked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        assert program.cut is not None and compiler.router is not None
        recipe = compiler.recipe
        self._original, self._compiler, self.report = Original(model), compiler, report
        self._signature = inspect.signature(compiler.host.forward)
        rank = getattr(recipe.experts, "rank", 1)
        self._owned = Ownership(compiler.host, program.sites, emitted, rank)
        if not recipe.freeze:
            self._owned.unfreeze()
        self._graphs = Graphs(compiler, self._owned, checked, self._plan_dense)
        self._checkpointing = False
        self._cache_format: Any = None
        self.names: list[str] = []
        self.trained: list[bool] = []
        self._expansions: list[int] = []
        self.shallow, self.deep = self._owned.shallow, self._owned.deep
        self.rest = self._owned.rest
        features = value(program.node(program.cut.node))
        self.router = make_router(compiler.router, features.shape, self.device)
        self._add([None] * recipe.num_experts, active=True)
        self.train(model.training)
        self._register_state_dict_hook(_collect_public)
        self.register_load_state_dict_pre_hook(_accept_public)

    def adopt(self, arguments: dict[str, Any], program: Program, emitted: Emitted) -> None:
        """Keep a compiled program for calls with such arguments."""
        self._graphs.adopt(arguments, program, emitted, device_and_dtype(self))

    # -- calls ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call; see its documentation for arguments and outputs."""
        return self.with_plan(*args, **kwargs)[0]

    def with_plan(self, *args: Any, **kwargs: Any) -> tuple[Any, RoutingPlan]:
        """(outputs, RoutingPlan) of a call, for losses on the routing: ``outputs.loss + 0.01 *
        plan.load_balance_loss() + 0.001 * plan.z_loss()``."""
        arguments, cache = self._arguments(args, kwargs)
        graph, leaves = self._graph(arguments)
        checkpointing = self._checkpointing and self.training and torch.is_grad_enabled()
        outputs, plan, after = graph.run(leaves, self._planner(cache), checkpointing, self._given)
        if graph.cache_at is not None:
            start, stop = graph.cache_at
            self._fill(cache, outputs[start:stop], after)
            outputs = [*outputs[:start], cache, *outputs[stop:]]
        return pytree.tree_unflatten(outputs, graph.out_spec), plan

    def route(self, *args: Any, **kwargs: Any) -> RoutingPlan:
        """The RoutingPlan for these inputs; its gates are differentiable where grad is enabled.

        Runs the shallow segment only.
        """
        arguments, cache = self._arguments(args, kwargs)
        graph, leaves = self._graph(arguments)
        return graph.plan(leaves, self._planner(cache), self._given)[0]

    @torch.no_grad()
    def features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the shallow segment gives at the cut for these inputs, for `use_features`."""
        arguments, _ = self._arguments(args, kwargs)
        graph, leaves = self._graph(arguments)
        return graph.features(leaves)

    def fit_router(self, expert: str | int | None, batches: Iterable[Any]) -> None:
        """Count these samples as an expert's and solve an analytic router anew.

        expert: name or index; None for the frozen model itself, on samples of what it could do
        before. batches: calls as `example_inputs` are given (tensor, tuple or dict). Only sums are
        kept; samples add to those of former calls, in any order. Raises ConfigError for a router
        that is not analytic.
        """
        router = self.router
        if not isinstance(router, AnalyticGate):
            raise ConfigError(
                "fit_router: this router is trained; convert with "
                "router=TokenRouter(fit='analytic') to solve it in closed form"
            )
        host, index = self._compiler.host, None if expert is None else self._index(expert)

        def observe(features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
            router.observe(features, mask, index)
            return router.without_experts(features), None

        with torch.no_grad():
            for batch in batches:
                arguments = as_arguments(host, batch)
                if is_hf(host):
                    from ..frontend.huggingface import without_cache

                    arguments = without_cache(host, arguments)
                arguments, _ = self._arguments((), arguments)
                graph, leaves = self._graph(arguments)
                graph.plan(leaves, observe)
        router.solve()
        if index is not None:
            self.trained[index] = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate() on the converted graphs, with its arguments."""
        host = self._compiler.host
        if not is_hf(host):
            raise InputError(f"{type(host).__name__} has no generate()")
        from ..frontend.huggingface import generate

        self._owned.show_to(host)
        with torch.no_grad():
            return generate(host, self, *args, **kwargs)

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Arguments by name, and the key-value cache where this call keeps one."""
        if self.training:
            self._begin_training()
        host = self._compiler.host
        arguments = bind(self._signature, type(host).__name__, args, kwargs)
        if not is_hf(host):
            return arguments, None
        from ..frontend.huggingface import call_arguments

        arguments, keep, cache = call_arguments(host, arguments, self.training)
        return (arguments, self._adopt_cache(arguments, cache)) if keep else (arguments, None)

    def _adopt_cache(self, arguments: dict[str, Any], cache: Any) -> Any:
        """A cache of the form that the graphs take; `arguments` gets its keys and values."""
        from ..frontend.kv_cache import CacheFormat, bare_cache

        current = device_and_dtype(self)
        if self._cache_format is None or self._cache_format[0] != current:
            self._owned.show_to(self._compiler.host)
            with self._compiler.as_in("eval"):
                self._cache_format = current, CacheFormat(self._compiler.host)
        main = arguments.get("input_ids", arguments.get("inputs_embeds"))
        if main is None:
            raise InputError("pass input_ids or inputs_embeds")
        cache = self._cache_format[1].adopt(cache, main.shape[0])
        arguments[CACHE] = bare_cache(cache)
        return cache

    def _graph(self, arguments: dict[str, Any]) -> tuple[Graph, list[torch.Tensor]]:
        """The graph that serves these arguments, and the tensors that it takes."""
        traced, _ = split_static(arguments)
        leaves = pytree.tree_leaves(traced)
        where = device_and_dtype(self)
        return self._graphs.get(arguments, leaves, self.training, where), leaves

    def _planner(self, cache: Any) -> Planner:
        if self._forced is not None:
            return self._forced
        state = None
        if cache is not None and self.router.spec.granularity == "prefix":
            from ..frontend.kv_cache import router_state

            state = router_state(cache).load()
        return lambda features, mask: self.router(features, mask, state)

    def _fill(self, cache: Any, leaves: list[torch.Tensor], after: PrefixState | None) -> None:
        from ..frontend.kv_cache import fill_cache, router_state

        if after is not None:
            router_state(cache).store(after, leaves[0].shape[2])
        fill_cache(cache, leaves)

    # -- what people expect ---------------------------------------------------------------------

    def to_dense(self) -> nn.Module:
        """The original model, which conversion never touched."""
        return self._original.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def print_trainable_parameters(self) -> None:
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute each deep block in the backward pass (non-reentrant)."""
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self._checkpointing = False

    @property
    def recipe(self) -> Recipe:
        """Everything that was decided at conversion."""
        return self._compiler.recipe

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
        if self._compiler.recipe.freeze:
            self.shallow.train(False)
        return self

    # -- saving ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write what was added (experts, router, recipe) as safetensors and JSON.

        A crash leaves the folder's previous save whole.
        """
        recipe = replace(
            self._compiler.recipe, split=self._compiler.at, router=self.router.spec,
            num_experts=self.num_experts,
        )  # fmt: skip
        facts = {
            "model": type(self.to_dense()).__name__,
            "recipe": recipe.to_dict(),
            "names": self.names,
            "trained": self.trained,
            "expansions": self._expansions,
            "classes": [] if self._head is None else [len(b) for b in self._head.bias],
        }
        checkpoint.write(folder, self._saved(), facts, self.to_dense())

    def add_expert(self, from_peft: str | os.PathLike, name: str | None = None) -> None:
        """Expand by an expert with the weights of a LoRA adapter in PEFT's format; it is off until
        activated. Raises CheckpointError, with nothing changed, for one that does not fit."""
        sites, spec = peft.lora_sites(self.expert_sites()), self.recipe.experts
        read = peft.read_adapter(sites, cast(LoRAExperts, spec), from_peft)
        self.expand(1, name=name)
        with torch.no_grad():
            for site, (a, b) in read.items():
                sites[site].a[-1].copy_(a)
                sites[site].b[-1].copy_(b)
        self.trained[-1] = True

    def export_peft(self, name: str | int, folder: str | os.PathLike) -> None:
        """Write one LoRA expert as an adapter in PEFT's format, for gate 1. Columns that it added
        to a head are not in it."""
        sites, spec = peft.lora_sites(self.expert_sites()), self.recipe.experts
        base = getattr(self.config, "_name_or_path", None) or None
        peft.write_adapter(sites, cast(LoRAExperts, spec), self._index(name), base, folder)

    def _saved(self) -> dict[str, torch.Tensor]:
        trained = {DENSE + n: t for n, t in self._owned.own_tensors().items()}
        return dict(added_tensors(self)) | trained

    def restore(
        self, tensors: dict[str, torch.Tensor], names: list[str], expansions: list[int],
        classes: list[int], trained: list[bool] | None = None,
    ) -> None:  # fmt: skip
        """Take over saved tensors, every one or none. trained: None for a save that does not say it:
        then experts count as trained whose row of the router is not zero. Raises CheckpointError.
        """
        for expert, count in enumerate(classes):
            if count and self._head is not None:
                self._head.widen(expert, count)
        for name in (k.removeprefix(DENSE) for k in tensors if k.startswith(DENSE)):
            if name in self._owned.refs:
                self._owned.unshare(name)
        own = self._saved()
        shapes, saved = ({k: t.shape for k, t in x.items()} for x in (own, tensors))
        if shapes != saved:
            odd = sorted(k for k in shapes | saved if shapes.get(k) != saved.get(k))[:3]
            raise CheckpointError(f"the saved tensors do not fit this model, such as {odd}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        self.names, self._expansions = list(names), list(expansions)
        self.trained = [bool(r.any()) for r in self.router.rows] if trained is None else trained
        self._train_newest()


def _accept_public(module: Any, state: dict, prefix: str, *rest: Any) -> None:
    state_to_private(module, module._owned.aliases, state, prefix)


def _collect_public(module: MoEModel, state: Any, prefix: str, metadata: Any) -> None:
    state_to_public(module._owned.aliases, state, prefix)
