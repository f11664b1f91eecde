"""The converted model: called like the original, and able to add experts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..experts.base import ExpertParameters
from ..experts.lora import peft
from ..frontend.capture import TRACING
from ..frontend.host import Host
from ..ir.aten import value
from ..ir.program import Program
from ..ir.steps import Emitted
from ..passes.kinds import kind_of, site_modules
from ..passes.pipeline import Compiler
from ..passes.recipe import Recipe
from ..routing.plan import Planner, RoutingPlan
from ..routing.select import make_router
from . import checkpoint
from .bound_graph import BoundGraph
from .dense_reference import DenseReference
from .expert_set import ExpertSet
from .graph_cache import GraphCache
from .parameters import ParameterStore, device_and_dtype
from .pickling import NotPickled
from .plan_override import PlanOverride
from .report import Report
from .state_dict import added_tensors, use_public_names


class MoEModel(NotPickled, nn.Module):
    """What `convert` returns: called with the original's arguments, it returns its outputs.
    `shallow`, `router` and `deep` are its modules; `report` says what was converted."""

    def __init__(
        self, model: nn.Module, compiler: Compiler, program: Program, emitted: Emitted,
        report: Report, checked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        assert program.cut is not None
        recipe = compiler.recipe
        self._compiler, self.report = compiler, report
        store = ParameterStore(compiler.host.module, emitted, site_modules(program, recipe))
        if not recipe.freeze:
            store.unfreeze()
        self._store = store
        self._checkpointing = False
        self.shallow, self.deep, self.rest = store.shallow, store.deep, store.rest
        features = value(program.node(program.cut.node))
        self.router = make_router(
            compiler.decisions.chosen, features.shape, self.device, program.cut.token_map
        )
        self._override = PlanOverride(self.router)
        self.reference = DenseReference(model, compiler, store)
        self._graphs = GraphCache(compiler, store, self.reference, checked, self._override.dense)
        fixed = kind_of(recipe.experts).fixed(recipe)
        self._experts = ExpertSet(self.router, store.sites.values(), store.tensors, fixed)
        self._experts.add([None] * recipe.num_experts, active=True)
        self.train(model.training)
        self.aliases = store.aliases
        use_public_names(self)

    def adopt(self, arguments: dict[str, Any], program: Program, emitted: Emitted) -> None:
        """Keep a compiled program for calls with arguments of this signature."""
        self._graphs.adopt(arguments, program, emitted, device_and_dtype(self))

    @property
    def host(self) -> Host:
        """A structural copy of the original over this model's tensors, to capture graphs from."""
        return self._compiler.host

    # -- calls ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and outputs are the original model's."""
        return self.with_plan(*args, **kwargs)[0]

    def with_plan(self, *args: Any, **kwargs: Any) -> tuple[Any, RoutingPlan]:
        """(outputs, RoutingPlan) of a call, for routing losses: ``outputs.loss + 0.01 *
        plan.load_balance_loss() + 0.001 * plan.z_loss()``."""
        arguments, cache = self.normalized(args, kwargs)
        graph, leaves = self.graph_for(arguments)
        checkpointing = self._checkpointing and self.training and torch.is_grad_enabled()
        features = self._override.features
        outputs, plan, after = graph.run(leaves, self._planner(cache), checkpointing, features)
        if graph.cache_at is not None:
            start, stop = graph.cache_at
            cache.fill(outputs[start:stop], after)
            outputs = [*outputs[:start], cache.cache, *outputs[stop:]]
        return pytree.tree_unflatten(outputs, graph.out_spec), plan

    def route(self, *args: Any, **kwargs: Any) -> RoutingPlan:
        """The RoutingPlan for these inputs; its gates are differentiable where grad is enabled.

        Runs the shallow segment only.
        """
        arguments, cache = self.normalized(args, kwargs)
        graph, leaves = self.graph_for(arguments)
        return graph.plan(leaves, self._planner(cache), self._override.features)[0]

    @torch.no_grad()
    def features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The features at the cut for these inputs: (B, S, D), (B, D) or (B, C, H, W), to pass to
        `use_features`. The deep segment does not run."""
        arguments, _ = self.normalized(args, kwargs)
        graph, leaves = self.graph_for(arguments)
        return graph.features(leaves)

    def fit_router(self, expert: str | int | None, batches: Iterable[Any]) -> None:
        """Add samples of an expert to an analytic router's statistics, and solve the router again.

        expert: name or index; None for the frozen model, with samples of its original task.
        batches: inputs in the form of `example_inputs` (tensor, tuple or dict).
        Only sums are kept, over all calls and in any order. Raises ConfigError unless the router is
        analytic (``TokenRouter(fit="analytic")``).
        """
        router, index = self.router, None if expert is None else self._experts.index(expert)
        router.require_analytic()

        def observe(features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, None]:
            router.observe(features, mask, index)
            return router.without_experts(features), None

        with torch.no_grad():
            for batch in batches:
                arguments, _ = self.normalized((), self.host.arguments(batch))
                graph, leaves = self.graph_for(arguments)
                graph.plan(leaves, observe)
        router.solve()
        if index is not None:
            self._experts.trained[index] = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate(), with its arguments, on the converted graphs."""
        with TRACING:
            self._store.load_into(self.host.module)
        with torch.no_grad():
            return self.host.generate(self, *args, **kwargs)

    def normalized(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A call's arguments by name, and its key-value cache or None."""
        if self.training:
            self._experts.begin_training()
        arguments = self.host.bind(args, kwargs)
        arguments, keeps, cache = self.host.split_cache(arguments, self.training)
        if not keeps:
            return arguments, None
        caches = self._graphs.cache_format(device_and_dtype(self))
        return arguments, caches.adopt(cache, arguments)

    def graph_for(self, arguments: dict[str, Any]) -> tuple[BoundGraph, list[Any]]:
        """The graph that serves these arguments, and the leaves that it takes."""
        return self._graphs.get(arguments, self.training, device_and_dtype(self))

    def _planner(self, cache: Any) -> Planner:
        if self._override.planner is not None:
            return self._override.planner
        state = None
        if cache is not None and self.router.keeps_state:
            state = cache.router_state().load()
        return lambda features, mask: self.router(features, mask, state)

    # -- plans that replace the router's --------------------------------------------------------

    def disable_experts(self) -> AbstractContextManager[None]:
        """Compute what the dense model computes, as PEFT's disable_adapter does."""
        return self._override.planning_by(self._override.dense)

    def dense_plan(self) -> AbstractContextManager[None]:
        """Route so that untrained experts give the dense model's output. LoRA experts, and copies
        whose gates sum to one, do so under the router's own plan; a replaced convolutional region
        runs frozen on every patch (on the whole map if patches are isolated or experts narrow)."""
        return self._override.of_fresh_experts(self._compiler.fresh)

    def use_plan(self, plan: RoutingPlan) -> AbstractContextManager[None]:
        """Route by this plan instead of the router's; `route` made it for as many samples."""
        return self._override.planning_by(self._override.plan(plan))

    def use_expert(self, name: str | int) -> AbstractContextManager[None]:
        """Route every row to one expert with gate 1, as if the task were known; it may be inactive.

        Raises ConfigError for a PatchRouter, whose experts choose patches themselves.
        """
        return self._override.planning_by(self._override.one_expert(self._experts.index(name)))

    def use_features(self, features: torch.Tensor) -> AbstractContextManager[None]:
        """Use these features, which `features` returned for the same samples, and skip the shallow
        blocks."""
        return self._override.given_features(features)

    # -- experts --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the experts, in order."""
        return self._experts.names

    @property
    def trained(self) -> list[bool]:
        """Whether each expert was trained since it was added, or its router row was fitted."""
        return self._experts.trained

    @property
    def num_experts(self) -> int:
        return len(self._experts)

    def expand(
        self, n: int = 1, name: str | None = None, classes: int | None = None
    ) -> list[nn.Parameter]:
        """Add n experts, freeze the older ones, and return the new parameters.

        They stay inactive, so no output changes, until `activate(name)` or the first forward in
        training mode. Rows of the router stay trainable. name: of the expert; with n > 1,
        ``name.0``, ``name.1``, ... classes: columns that the (last) new expert appends to the
        classification head; while it is inactive they are minus infinity, or absent if no later
        columns are active. Raises ConfigError for a wrong value or where no expert can be added.
        """
        return self._experts.expand(n, name, classes)

    def activate(self, name: str | int) -> None:
        """Let an expert, by name or index, take part in routing. Raises ConfigError."""
        self._experts.set_active(name, True)

    def deactivate(self, name: str | int) -> None:
        """Take an expert out of routing; its parameters stay. Raises ConfigError."""
        self._experts.set_active(name, False)

    def remove_last(self) -> None:
        """Remove the newest expert; the router is bitwise what it was before that was added."""
        self._experts.remove_last()

    def expert_index(self, name: str | int) -> int:
        """The index of an expert, by name or index. Raises ConfigError if there is none."""
        return self._experts.index(name)

    def expert_sites(self) -> list[ExpertParameters]:
        """One module a site, with the parameters of all experts there."""
        return list(self._experts.sites)

    @property
    def sites(self) -> list[str]:
        """Dotted names of the modules with LoRA experts, as PEFT's target_modules take them."""
        return [s.site.name for s in self._experts.sites if s.as_adapter]

    # -- as in torch, PEFT and transformers -----------------------------------------------------

    def to_dense(self) -> nn.Module:
        """The original model, which conversion never touched."""
        return self.reference.original

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
        """The options of the conversion, with the split, router and number of experts as now."""
        return replace(
            self._compiler.recipe, split=self._compiler.decisions.split, router=self.router.spec,
            num_experts=self.num_experts,
        )  # fmt: skip

    @property
    def config(self) -> Any:
        return self.host.config

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
        """Write what was added (experts, router, recipe) as safetensors and JSON. A crash leaves the
        folder's previous save whole."""
        checkpoint.write(folder, self.saved_tensors(), self._facts(), self.reference.state)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a save holds: the added tensors, and dense ones that training may have changed."""
        written = {checkpoint.DENSE + n: t for n, t in self._store.written_tensors().items()}
        return dict(added_tensors(self)) | written

    def _facts(self) -> dict[str, Any]:
        experts, head = self._experts, self._experts.head
        return {
            "model": type(self.to_dense()).__name__,
            "recipe": self.recipe.to_dict(),
            "names": experts.names,
            "trained": experts.trained,
            "expansions": experts.expansions,
            "classes": [] if head is None else head.classes,
        }

    def restore(self, tensors: dict[str, torch.Tensor], facts: checkpoint.Facts) -> None:
        """Load saved tensors: all or none. Raises CheckpointError."""
        experts = self._experts
        if experts.head is not None:
            experts.head.widen_all(facts.classes)
        self._store.copy_on_write(*checkpoint.dense_names(tensors))
        checkpoint.fill(self.saved_tensors(), tensors)
        flags = facts.trained or [bool(row.any()) for row in self.router.rows]
        experts.take_over(facts.names, flags, facts.expansions)

    def add_expert(self, from_peft: str | os.PathLike, name: str | None = None) -> None:
        """Add an expert with the weights of a LoRA adapter in PEFT's format, inactive until
        `activate`. Raises CheckpointError, with nothing changed, if the adapter does not fit."""
        sites = peft.lora_sites(self._experts.sites)
        read = peft.read_adapter(sites, self.recipe.experts, from_peft)
        self.expand(1, name=name)
        peft.fill_newest(sites, read)
        self.trained[-1] = True

    def export_peft(self, name: str | int, folder: str | os.PathLike) -> None:
        """Write one LoRA expert, at gate 1, as an adapter in PEFT's format, without columns that it
        added to a head. Raises ConfigError for experts of another kind."""
        sites = peft.lora_sites(self._experts.sites)
        base = getattr(self.config, "_name_or_path", None) or None
        peft.write_adapter(sites, self.recipe.experts, self.expert_index(name), base, folder)
