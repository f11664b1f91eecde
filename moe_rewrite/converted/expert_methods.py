"""The methods of a converted model that add, remove and choose experts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import is_number, require
from ..experts.base import ExpertParameters
from ..experts.lora import peft
from ..frontend.capture import TRACING
from ..passes.pipeline import Compiler
from ..passes.recipe import Recipe
from ..routing.plan import RoutingPlan
from ..routing.router import Router
from . import carving, low_precision, offloading
from .expert_set import ExpertSet
from .fewer_experts import join, prune, use_of
from .merge import merge_expert
from .parameters import ParameterStore
from .plan_override import PlanOverride


class ExpertMethods(nn.Module):
    """The experts of a converted model, by name or index; each method raises ConfigError for
    another."""

    _experts: ExpertSet
    _override: PlanOverride
    _compiler: Compiler
    _store: ParameterStore
    router: Router

    @property
    def recipe(self) -> Recipe:
        """The options of the conversion, with the split, router and number of experts as now."""
        return replace(
            self._compiler.recipe, split=self._compiler.decisions.split, router=self.router.spec,
            num_experts=self.num_experts,
        )  # fmt: skip

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
        """Number of experts, inactive ones included."""
        return len(self._experts)

    def expand(
        self, n: int = 1, name: str | None = None, classes: int | None = None
    ) -> list[nn.Parameter]:
        """Add n experts, freeze the older ones, and return the new parameters.

        They stay inactive, so no output changes, until `activate(name)` or the first forward in
        training mode. Rows of the router stay trainable. Called in all processes that train the
        model.

        n: how many.
        name: of the expert; with n > 1, ``name.0``, ``name.1``, ...
        classes: columns that the (last) new expert appends to the classification head; while it is
            inactive they are minus infinity, or absent if no later columns are active.

        Raises ConfigError for a wrong value or where no expert can be added.
        """
        with torch.inference_mode(False):  # what is made here is trained elsewhere
            return self._experts.expand(n, name, classes)

    def activate(self, name: str | int) -> None:
        """Let an expert, by name or index, take part in routing. Raises ConfigError."""
        self._experts.set_active(name, True)

    def deactivate(self, name: str | int) -> None:
        """Take an expert out of routing; its parameters stay. Raises ConfigError."""
        self._experts.set_active(name, False)

    def set_active(self, share: float) -> None:
        """Have a token run another share of a carved model's hidden units from now on, as
        ``CarvedExperts(active=share)`` would; saves say so. Raises ConfigError for a share that is
        no whole number of experts, and for experts of other kinds."""
        carving.set_active(self, share)

    def remove_last(self) -> None:
        """Remove the newest expert; the router is bitwise what it was before that was added."""
        self._store.require_whole("remove_last()")
        self._experts.remove_last()

    def remove(self, name: str | int) -> None:
        """Remove any expert; the others stay bitwise what they are, and compute what they do while it
        is off (an analytic router is solved again without it). Raises ConfigError for the only one.
        """
        self._store.require_whole("remove()")
        self._experts.remove(name)

    def expert_use(self, batches: Iterable[Any]) -> dict[str, float]:
        """The share of rows that goes to each expert over these inputs, by name: its mean gate.

        batches: inputs as for `fit_router`. Raises ConfigError without rows.
        """
        return use_of(self, batches)

    def prune(self, batches: Iterable[Any], below: float) -> dict[str, float]:
        """Remove the experts whose share of rows over these inputs (`expert_use`) is smaller than
        `below`; returns their names and shares.

        Raises ConfigError where none would be left, and as `remove` and `expert_use`.
        """
        self._store.require_whole("prune()")
        return prune(self, batches, below)

    def join_experts(
        self, first: str | int, second: str | int, weight: float = 0.5
    ) -> dict[str, float]:
        """Make one expert of two: at each site the map of an expert's rank that is nearest to
        ``(1 - weight) * first + weight * second``, by the singular value decomposition. It has the
        first one's name and place, and an analytic router sends it the rows of both; the second one
        is removed. Returns the share of the mean that is lost at each site, by Frobenius norms.

        For trained LoRA experts without columns of a head, and an analytic router with a matrix for
        each. Raises ConfigError for others; nothing is changed then.
        """
        self._store.require_whole("join_experts()")
        pair = self._experts.index(first), self._experts.index(second)
        return join(self, *pair, weight)

    def rename(self, name: str | int, new: str) -> None:
        """Give an expert another name. Raises ConfigError for one that is taken."""
        self._experts.rename(name, new)

    def freeze(self, name: str | int, frozen: bool = True) -> None:
        """Keep an expert's parameters as they are in training, or (False) train it again if it is
        among the newest. Its row of the router stays trainable, as those of older experts do."""
        self._experts.freeze(name, frozen)

    def merge_expert(self, name: str | int, example_inputs: Any = None) -> nn.Module:
        """A dense model of the original's class, with tensors of its own, that computes what this
        one does within `use_expert(name)`; the two are compared.

        example_inputs: as for `convert`.

        Raises ConfigError for experts that one dense weight cannot do (of regions, beside computed
        or tied weights, with columns of a head).
        """
        self._store.require_whole("merge_expert()")
        low_precision.require_not_quantized(self._experts.sites, "merge_expert()")
        return merge_expert(self, self._experts.index(name), example_inputs)

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

    def quantize_experts(self, dtype: str = "int8") -> None:
        """Keep the matrices of feed-forward experts in low precision from now on, for inference; the
        values of before are gone. On the CPU the products are computed in it too: a row is rounded
        to int8 by its largest value, sums are exact. Saves hold what this makes, and load bitwise.

        dtype: ``"int8"``, with a scale for each output channel, or ``"bfloat16"``.

        Calls in training mode, gradients, `expand`, `merge_expert`, `save_standard` and export are
        refused from then on. Raises ConfigError for other dtypes, experts of other kinds, and where
        it was done before.
        """
        self._store.require_whole("quantize_experts()")
        low_precision.quantize(self._experts.sites, dtype)

    @property
    def experts_quantized(self) -> str | None:
        """The dtype of experts' matrices after `quantize_experts`; None before."""
        return low_precision.quantized(self._experts.sites)

    def offload_experts(
        self, keep: int | None = 16, folder: str | os.PathLike | None = None
    ) -> None:
        """Have the weights of experts lie off the device from now on, in the host's memory (pinned
        for a GPU). A call brings those that its rows go to; copies of the ones used last stay.

        keep: of how many experts copies stay between calls; a call may use more. None: bring all
            experts back to the device.
        folder: of a save of these experts, whose file then holds the weights: it is mapped, and
            takes no memory until a call reads from it.

        Experts that are trained lie on the device; `expand` and `freeze` send the older ones off.
        Outputs are the same; with gradients too, only the taken and the trained experts run. Without
        a ``top_k`` rows go to every expert that is on, so that all of these are brought.

        Raises ConfigError for experts of other kinds and of layers with routers of their own,
        CheckpointError for a folder that does not hold these values; nothing is changed then.
        """
        self._store.require_whole("offload_experts()")
        offloading.offload(self, keep, folder)

    @property
    def experts_offloaded(self) -> int | None:
        """Of how many experts copies stay on the device after `offload_experts`; None before."""
        return self._store.off_device.keep

    def expert_bytes(self) -> dict[str, int]:
        """Bytes of experts' weights: on the ``"device"``, copies and trained ones; and off it, in
        ``"memory"`` and in a mapped ``"file"``."""
        return offloading.held(self._experts.sites)

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
        gates = {self._experts.index(name): 1.0}
        return self._override.planning_by(self._override.fixed_gates(gates, "use_expert"))

    def use_experts(self, weights: Mapping[str | int, float]) -> AbstractContextManager[None]:
        """Route every row to several experts with these gates; the frozen model's output has what
        is left of 1. Raises ConfigError as `use_expert`, and for other weights than numbers >= 0."""
        for name, weight in weights.items():
            require(
                is_number(weight) and weight >= 0, f"weight of {name!r}", weight, "a number >= 0"
            )
        require(len(weights) > 0, "weights", weights, "at least one expert with its weight")
        gates = {self._experts.index(name): float(w) for name, w in weights.items()}
        return self._override.planning_by(self._override.fixed_gates(gates, "use_experts"))

    def use_features(self, features: torch.Tensor) -> AbstractContextManager[None]:
        """Use these features, which `features` returned for the same samples, and skip the shallow
        blocks."""
        return self._override.given_features(features)

    # -- PEFT's files ---------------------------------------------------------------------------

    def add_expert(self, from_peft: str | os.PathLike, name: str | None = None) -> None:
        """Add an expert with the weights of a LoRA adapter in PEFT's format, inactive until
        `activate`. Raises CheckpointError, with nothing changed, if the adapter does not fit."""
        self._store.require_whole("add_expert()")
        sites = peft.lora_sites(self._experts.sites)
        read = peft.read_adapter(sites, self.recipe.experts, from_peft)
        self.expand(1, name=name)
        peft.fill_newest(sites, read)
        self.trained[-1] = True

    def export_peft(self, name: str | int, folder: str | os.PathLike) -> None:
        """Write one LoRA expert, at gate 1, as an adapter in PEFT's format, without columns that it
        added to a head. Raises ConfigError for experts of another kind."""
        self._store.require_whole("export_peft()")
        sites = peft.lora_sites(self._experts.sites)
        base = getattr(self._compiler.host.config, "_name_or_path", None) or None
        peft.write_adapter(sites, self.recipe.experts, self.expert_index(name), base, folder)

    # -- the original's modules -----------------------------------------------------------------

    def _host_module(self) -> nn.Module:
        """The copy of the original that graphs are captured from, over this model's tensors."""
        with TRACING:
            self._store.load_into(self._compiler.host.module)
        return self._compiler.host.module
