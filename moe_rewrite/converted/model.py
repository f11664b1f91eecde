"""The converted model: called like the original, and able to add experts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..frontend.host import Host
from ..ir.aten import value
from ..ir.program import Program
from ..ir.steps import Emitted
from ..kernels.autocast import autocasts
from ..passes.kinds import kind_of, site_modules
from ..passes.pipeline import Compiler
from ..routing.plan import Planner, RoutingPlan
from ..routing.router import Router
from ..routing.select import make_router
from ..routing.statistics import RoutingStatistics
from ..utils.sharded import in_process_group, require_known_to_ddp
from ..utils.zero_stage_3 import is_parted_by_zero, require_no_recomputing, show_to_zero
from .dense_reference import DenseReference
from .expert_set import ExpertSet
from .graphs.block_module import BlockRun
from .graphs.bound_graph import COMPILED_AROUND, BoundGraph
from .graphs.graph_cache import GraphCache
from .graphs.regional import compiles, outside, skipped
from .parameters import ParameterStore, device_and_dtype
from .pickling import NotPickled
from .pipeline_stages import DeepStage, ShallowStage, stages_of
from .plan_override import PlanOverride
from .report import Report
from .router_fit import RouterFit
from .saving.save_methods import Saving
from .saving.state_dict import StateDict, added, after_load_state_dict
from .tensor_parallel import divide


class Begun(NamedTuple):
    """A call whose graph is to run. given: the arguments of `BoundGraph.run`."""

    arguments: dict[str, Any]
    cache: Any
    graph: BoundGraph
    given: tuple[Any, ...]

    def ran(self) -> tuple[list[Any], RoutingPlan, Any]:
        with nullcontext() if self.cache is None else self.cache.filling():
            return self.graph.run(*self.given)


class MoEModel(NotPickled, StateDict, Saving, RouterFit):
    """What `convert` returns: called with the original's arguments, it returns its outputs.

    Its modules have the original's names, and below `moe_rewrite` what conversion added; `shallow`,
    `router` and `deep` are its parts, over the same tensors. `report` says what was converted.
    Each of `watchers` is shown the plans of training.
    """

    shallow: BlockRun
    deep: BlockRun
    router: Router

    def __init__(
        self, model: nn.Module, compiler: Compiler, program: Program, emitted: Emitted,
        report: Report, checked: bool,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        assert program.cut is not None
        recipe = compiler.recipe
        self._compiler, self._report = compiler, report
        store = ParameterStore(self, compiler.host.module, emitted, site_modules(program, recipe))
        if not recipe.freeze:
            store.unfreeze()
        self._store = store
        self._checkpointing = False
        self.watchers: list[RoutingStatistics] = []
        features = value(program.node(program.cut.node))
        router = make_router(
            compiler.decisions.chosen, features.shape, self.device, program.cut.token_map,
            kind_of(recipe.experts).rule(recipe),
        )  # fmt: skip
        # parts of the model, beside the tree of names that owns the tensors
        self.__dict__.update(shallow=store.shallow, deep=store.deep, router=router)
        self._override = PlanOverride(router)
        self.reference = DenseReference(model, compiler, store)
        self._graphs = GraphCache(compiler, store, self.reference, checked, self._override.dense)
        fixed = kind_of(recipe.experts).fixed(recipe)
        self._experts = ExpertSet(router, store.sites.values(), store, fixed)
        self._experts.add([None] * recipe.num_experts, active=True)
        self._modules["moe_rewrite"] = added(self._experts, store.sites)
        self.__dict__.update(compiler.host.values_for(self, MoEModel))
        self.register_load_state_dict_post_hook(after_load_state_dict)
        skipped(type(self).forward, MoEModel.with_plan, Begun.ran, *COMPILED_AROUND)
        self.train(model.training)

    def adopt(self, arguments: dict[str, Any], program: Program, emitted: Emitted) -> None:
        """Keep a compiled program for calls with arguments of this signature."""
        self._graphs.adopt(arguments, program, emitted, device_and_dtype(self))

    def __getattr__(self, name: str) -> Any:
        """What is not found here is looked for among the original's values, such as a count of
        classes that a tool reads; not among its methods, which would run without experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            values = vars(self._compiler.host.module) if "_compiler" in vars(self) else {}
            if name in values and not name.startswith("__"):
                return values[name]
            raise

    @property
    def report(self) -> Report:
        """What was converted, what was not and why."""
        return self._report.of_model(self)

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
        if compiles():  # then only steps are compiled
            begun = outside(self._begun, args, kwargs)
            return outside(self._ended, begun, *begun.ran())
        begun = self._begun(args, kwargs)
        return self._ended(begun, *begun.ran())

    def _begun(self, args: tuple, kwargs: dict[str, Any]) -> Begun:
        """A call up to where its graph runs."""
        arguments, cache = self.normalized(args, kwargs)
        graph, leaves = self.graph_for(arguments)
        checkpointing = self._checkpointing and self.training and torch.is_grad_enabled()
        given = leaves, self._planner(cache, counts=True), checkpointing, self._override.features
        return Begun(arguments, cache, graph, given)

    def _ended(
        self, begun: Begun, outputs: list[Any], plan: RoutingPlan, after: Any
    ) -> tuple[Any, RoutingPlan]:
        arguments, cache, graph, _ = begun
        if graph.cache_at is not None:
            start, stop = graph.cache_at
            cache.fill(outputs[start:stop], after)
            outputs = [*outputs[:start], cache.cache, *outputs[stop:]]
        elif cache is not None:  # a paged one, which the graph has filled
            cache.keep(after)
        if in_process_group() and self._store.sharded:
            self._experts.forget()  # whole stacks and casts of experts
        if self.watchers and self.training:
            for watcher in self.watchers:
                watcher.add(plan, arguments.get(graph.emitted.mask or ""))
        return pytree.tree_unflatten(outputs, graph.out_spec), plan

    def compile(self, *, dynamic: bool | None = True, **options: Any) -> None:
        """Compile each block by torch.compile, as transformers' regional compilation does; alike
        ones once. The first call of a kind takes longer; other lengths and experts that come or go
        compile nothing more.

        dynamic, options: as torch.compile's, such as ``backend`` and ``mode``.

        ``torch.compile(moe)`` does the same in a module of its own. Hooked or sharded blocks do not.
        """
        super().compile(dynamic=dynamic, **options)

    def route(self, *args: Any, **kwargs: Any) -> RoutingPlan:
        """The RoutingPlan for these inputs; its gates are differentiable where grad is enabled.

        Runs the shallow segment only, or all where every layer has a router of its own.
        """
        if self.router.by_layer:
            return self.with_plan(*args, **kwargs)[1]
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate(), with its arguments, on the converted graphs."""
        self._host_module()
        with torch.no_grad():
            return self.host.generate(self, self._cache_format, *args, **kwargs)

    def _cache_format(self) -> Any:
        return self._graphs.cache_format(device_and_dtype(self))

    def normalized(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A call's arguments by name, and its key-value cache or None."""
        if self.training:
            require_known_to_ddp(p for p in self.parameters() if p.requires_grad)
            if self._override.planner is None:
                self._experts.learner(torch.is_grad_enabled())  # a refusal changes nothing
            self._experts.begin_training()
        return self.bound(args, kwargs, self.training)

    def bound(self, args: tuple, kwargs: dict, training: bool) -> tuple[dict[str, Any], Any]:
        """`normalized` of a call in a mode, without what a call does to the experts."""
        arguments = self.host.bind(args, kwargs)
        split = self.host.split_cache(arguments, training, self._cache_format)
        arguments, keeps, cache = split
        if not keeps:
            return arguments, None
        return arguments, self._cache_format().adopt(cache, arguments)

    def graph_for(
        self, arguments: dict[str, Any], training: bool | None = None
    ) -> tuple[BoundGraph, list[Any]]:
        """The graph that serves these arguments, and the leaves that it takes. training: None: as
        the model is."""
        mode = self.training if training is None else training
        graph, leaves = self._graphs.get(arguments, mode, device_and_dtype(self))
        if in_process_group() and is_parted_by_zero(next(self.parameters())):
            require_no_recomputing(self._checkpointing)
            show_to_zero((*graph.owned(), *((self.router, row) for row in self.router.rows)))
        return graph, leaves

    def pipeline_stages(self, output: str | None = None) -> tuple[ShallowStage, DeepStage]:
        """The frozen and the deep half as two stages of torch.distributed.pipelining, over this
        model's tensors: the first takes a call's arguments, the second the first one's result and
        the arguments by name.

        output: which of the model's outputs the second returns; None: the first.

        Raises ConfigError if the shallow half is trained.
        """
        return stages_of(self, output)

    def tensor_parallel(self, mesh: Any) -> None:
        """Divide the dense weights over a mesh's processes by the base model's tensor parallel plan
        (transformers' base_model_tp_plan); experts and router stay whole in each.

        mesh: a DeviceMesh of one dimension over all processes. Called in all of them, which hold the
            same model and are then called with the same inputs.

        Raises ConfigError where there is no plan or it divides in a way that is not known, for
        experts that are not LoRA, and for weights that are quantised or trained; EquivalenceError
        where the divided model computes something else. Nothing is divided then.
        """
        divide(self, mesh)

    def _planner(self, cache: Any, counts: bool = False) -> Planner:
        """counts: the call is a forward, whose rows count for the expert that is trained."""
        if self._override.planner is not None:
            return self._override.planner
        keeps = cache is not None and self.router.keeps_state
        state = None if cache is None else cache.state_for(self.router)
        learning = self.learning_planner(state, counts, keeps) if self.training else None
        if learning is None:
            self._experts.require_known()

        def plan(features: torch.Tensor, mask: Any) -> tuple[RoutingPlan, Any]:
            if not autocasts(features.device.type):
                return learning(features, mask) if learning else self.router(features, mask, state)
            with torch.autocast(features.device.type, enabled=False):  # gates are made in float32
                return learning(features, mask) if learning else self.router(features, mask, state)

        return plan

    # -- as in torch, PEFT and transformers -----------------------------------------------------

    def to_dense(self) -> nn.Module:
        """The original model, which conversion never touched."""
        return self.reference.original

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What gets gradients, for an optimizer: the newest experts and a router trained by gradient
        (with ``freeze=False`` the dense weights too)."""
        return [p for p in self.parameters() if p.requires_grad]

    def print_trainable_parameters(self) -> None:
        """Print numbers and share of trained parameters, in PEFT's form."""
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def gradient_checkpointing_enable(
        self, *args: Any, every_n_layers: int = 1, offload: bool = False, **kwargs: Any
    ) -> None:
        """Recompute each deep block in the backward pass (non-reentrant, whatever is asked for).

        every_n_layers, offload: transformers' options; others than the defaults raise ConfigError.
        """
        if every_n_layers != 1 or offload:
            raise ConfigError(
                f"every_n_layers={every_n_layers}, offload={offload}: every deep block of a converted "
                "model is checkpointed, on its device; leave these options out"
            )
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpointing = False

    activation_checkpointing_enable = gradient_checkpointing_enable  # transformers' newer name
    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether deep blocks are recomputed in the backward pass."""
        return self._checkpointing

    is_activation_checkpointing = is_gradient_checkpointing

    @property
    def config(self) -> Any:
        """The original's configuration, if it has one."""
        return self.host.config

    @property
    def device(self) -> torch.device:
        """Of the dense weights."""
        return device_and_dtype(self)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weights; experts and router have their own."""
        return device_and_dtype(self)[1]

    def train(self, mode: bool = True) -> MoEModel:
        """As in torch. Going to eval solves an analytic router from the rows of training; raises
        InputError if their features were not finite."""
        if not mode:
            self.settle_router()
        self._experts.forget()  # an optimizer may have written through `.data`
        super().train(mode)
        self.deep.train(mode)
        self.shallow.train(mode and not self._compiler.recipe.freeze)
        return self
