"""The pipeline, kept at hand: a converted model compiles further graphs as it is called.

The first conversion takes the decisions (where to cut, which sites); every later graph (training,
decoding, a call with labels) is captured from the same host and must follow them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..analysis.causality import is_causal
from ..config import (
    UPCYCLE,
    FFNExperts,
    PatchRouter,
    Recipe,
    RegionExperts,
    RouterSpec,
    TokenRouter,
)
from ..errors import CaptureError, ConversionError
from ..frontend.capture import capture
from ..ir.aten import value
from ..ir.program import Program
from ..ir.sites import RegionSite, Rejection
from ..ir.steps import Emitted
from ..routing.select import fit_router
from .clean import clean
from .emit import emit
from .find_lora_sites import find_sites
from .freeze_shallow import freeze
from .insert_feedforward import find_feedforward_sites, insert_feedforward
from .insert_lora import insert_experts
from .insert_region import insert_region
from .insert_router import route
from .lower import Lower
from .split import find_depth, shallow_modules, split
from .widen_head import widen_head


@dataclass
class Compiler:
    """host: structural copy of the original over the converted model's own tensors.

    router: the recipe's, with "auto" resolved. shallow: modules that run before the cut only.
    at: the split every graph uses. sites: the names that hold experts. seconds: time by pass.
    """

    host: nn.Module
    recipe: Recipe
    router: RouterSpec | None = None
    at: int | str = 0
    shallow: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()
    rejected: tuple[Rejection, ...] = ()
    train_note: str = ""
    containers_eval: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def dense(self, arguments: dict[str, Any], mode: str, static_ones: bool = False) -> Program:
        """Capture and clean, in eval mode or with the deep segment in training mode."""
        with self.as_in(mode):
            captured = self.timed(
                f"capture ({mode})", capture, self.host, arguments, mode, static_ones
            )
        return self.timed("clean", clean, captured)

    @contextmanager
    def as_in(self, mode: str) -> Any:
        """Put the host's modules in the mode that a converted model runs them in."""
        flags = [(m, m.training) for m in self.host.modules()]
        try:
            self.host.train(mode == "train")
            if mode == "train":
                for path in self.shallow if self.recipe.freeze else ():
                    self.host.get_submodule(path).eval()
                for name, module in self.host.named_modules():
                    frozen_norm = isinstance(module, _NormBase) and self._norms_frozen()
                    around = self.containers_eval and self._around_shallow(name)
                    if frozen_norm or around:
                        module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training

    def _norms_frozen(self) -> bool:
        return self.recipe.batch_norm == "frozen"

    def _around_shallow(self, name: str) -> bool:
        return name == "" or any(path.startswith(name + ".") for path in self.shallow)

    def cut(self, program: Program, at: int | float | str) -> Program:
        name = type(self.host).__name__
        program = self.timed("depth", find_depth, program, name, at)
        return self.timed("split", split, program, at)

    def decide(self, arguments: dict[str, Any]) -> list[Program]:
        """Capture in both modes, take every decision, and hand back the routed programs: that of
        evaluation, and that of training where no decision changes how it is to be captured."""
        evaluated = self.cut(self.dense(arguments, "eval"), self.recipe.split)
        assert evaluated.cut is not None and evaluated.depth is not None
        named = isinstance(self.recipe.split, str) and self.recipe.split != "auto"
        self.at = evaluated.cut.label if named else evaluated.cut.index
        if evaluated.depth.stack is not None and not named:
            raise ConversionError(
                f"{evaluated.depth.model} has several mainlines: name the module that the deep "
                f"segment starts with, such as split={evaluated.depth.blocks[-1].name!r}.\n"
                f"{evaluated.depth}"
            )
        self.shallow = self._shallow(evaluated)
        self.router = self._fit_router(evaluated, arguments)
        if isinstance(self.recipe.experts, RegionExperts):
            return self._decide_region(evaluated, arguments)
        eval_sites, rejected = self.find(evaluated)
        in_training, holds = self._in_training(arguments)
        train_sites, _ = self.find(in_training)
        in_both = {s.name for s in train_sites}
        lost = [
            Rejection(s.name, "absent in training") for s in eval_sites if s.name not in in_both
        ]
        self.sites = frozenset(s.name for s in eval_sites if s.name in in_both)
        self.rejected = (*rejected, *lost)
        if not self.sites:
            reasons = "\n".join(f"  {r.name}: {r.reason}" for r in self.rejected) or "  none found"
            raise ConversionError(
                f"no site to convert behind split={self.recipe.split!r}. Sites and reasons:\n"
                f"{reasons}\nSplit earlier, choose other sites (LoRAExperts(sites='all+head') takes "
                "the head in), or another router granularity."
            )
        trained = self.insert(in_training, train_sites)
        return [self.insert(evaluated, eval_sites), *([trained] if holds else [])]

    def _decide_region(self, evaluated: Program, arguments: dict[str, Any]) -> list[Program]:
        program = self.insert(evaluated)
        self.sites = frozenset(s.name for s in program.sites if isinstance(s, RegionSite))
        in_training, holds = self._in_training(arguments)
        trained = self.insert(in_training)  # raises where training cannot run on patches
        return [program, *([trained] if holds else [])]

    def _in_training(self, arguments: dict[str, Any]) -> tuple[Program, bool]:
        """The training graph, cut; and whether the shallow modules are those it was captured with:
        a dropout shows in the training graph only."""
        program, known = self.cut(self.train_capture(arguments), self.at), self.shallow
        self.shallow = known | self._shallow(program)
        return program, self.shallow == known

    def _fit_router(self, program: Program, arguments: dict[str, Any]) -> RouterSpec:
        assert program.cut is not None
        features = value(program.node(program.cut.node))
        causal = features.ndim == 3 and is_causal(program, self.host, arguments)
        default = UPCYCLE if self.recipe.mode == "upcycle" else None
        return fit_router(self.recipe.router, features.shape, causal, default)

    def _shallow(self, program: Program) -> frozenset[str]:
        return frozenset(p for p in shallow_modules(program) if self._has(p))

    def _has(self, path: str) -> bool:
        try:
            self.host.get_submodule(path)
        except AttributeError:
            return False
        return True

    def train_capture(self, arguments: dict[str, Any], static_ones: bool = False) -> Program:
        """The training graph; where a module around the cut cannot be traced in training mode
        (layer drop), with those modules in eval mode, which the report says."""
        if self.containers_eval:
            return self.dense(arguments, "train", static_ones)
        try:
            return self.dense(arguments, "train", static_ones)
        except CaptureError as error:
            self.containers_eval = True
            try:
                program = self.dense(arguments, "train", static_ones)
            except CaptureError:
                raise error from None
            self.train_note = f"modules around the cut train in eval mode: {error}".split("\n")[0]
            return program

    def find(self, program: Program) -> tuple[dict[Any, list], list[Rejection]]:
        ffn = isinstance(self.recipe.experts, FFNExperts)
        find = find_feedforward_sites if ffn else find_sites
        return self.timed("sites", find, program, self.recipe.experts, self.router)

    @property
    def equals_dense(self) -> bool:
        """Whether experts fresh from a conversion give the dense model's output as they are routed:
        LoRA experts are zero, copies of a feed-forward need gates that sum to one."""
        if isinstance(self.recipe.experts, FFNExperts):
            router = self.router
            return isinstance(router, TokenRouter) and router.sums_to_one
        return not isinstance(self.recipe.experts, RegionExperts)

    def _frozen(self, program: Program) -> Program:
        return self.timed("freeze", freeze, program) if self.recipe.freeze else program

    def insert(self, program: Program, sites: dict[Any, list] | None = None) -> Program:
        """Freeze, route, and insert experts: at the sites decided on, or in the region's place."""
        program = self.timed("route", route, self._frozen(program))
        experts = self.recipe.experts
        if isinstance(experts, RegionExperts):
            assert isinstance(self.router, PatchRouter) and self.router.grid is not None
            count = self.recipe.num_experts
            program = self.timed(
                "insert experts", insert_region, program, experts, count, self.router.grid
            )
        else:
            kept = {s: m for s, m in (sites or {}).items() if s.name in self.sites}
            rejected = list(self.rejected)
            given: tuple[Any, ...] = (program, kept, rejected)
            if isinstance(experts, FFNExperts):
                program = self.timed(
                    "insert experts", insert_feedforward, *given, self.equals_dense
                )
            else:
                program = self.timed("insert experts", insert_experts, *given)
        program = self.timed("widen head", widen_head, program)
        return self._lowered(program)

    def _lowered(self, program: Program) -> Program:
        backend: Any = self.recipe.backend
        if backend == "reference":
            return program
        assert self.router is not None
        form = None if backend == "auto" else backend
        lower = Lower(form, self.router, self.recipe.num_experts)
        return self.timed("lower", lower, program)

    def compile(
        self, arguments: dict[str, Any], mode: str, static_ones: bool = False
    ) -> tuple[Program, Emitted]:
        """One more graph, for a call the model has not seen."""
        run = self.train_capture if mode == "train" else self._eval_capture
        program = self.cut(run(arguments, static_ones), self.at)
        if isinstance(self.recipe.experts, RegionExperts):
            program = self.insert(program)
            return program, self.timed("emit", emit, program)
        sites, rejected = self.find(program)
        missing = self.sites - {s.name for s in sites}
        present = missing & {r.name for r in rejected}
        if present:
            reasons = [f"{r.name}: {r.reason}" for r in rejected if r.name in present]
            raise CaptureError(
                f"with the arguments {sorted(arguments)}, sites that hold experts cannot be "
                f"routed: {'; '.join(reasons)}. Call without the argument that changes this."
            )
        program = self.insert(program, sites)
        return program, self.timed("emit", emit, program)

    def _eval_capture(self, arguments: dict[str, Any], static_ones: bool) -> Program:
        return self.dense(arguments, "eval", static_ones)


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating-point parameter."""
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.get_default_dtype()
