"""From a dense model to a MoEModel: the list of passes in `passes.pipeline`, on an evaluation graph.

capture -> inline regions -> clean -> depth -> split | sites | freeze -> route -> insert experts -> widen head ->
lower -> emit -> verify. At the bars `passes.decide` takes the decisions that later graphs follow;
training graphs are captured when the model is first trained.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    InvariantError,
    MoeRewriteError,
    require_package,
)  # fmt: skip
from ..frontend.capture import program_of
from ..frontend.choose_host import host_of, without_wrapper
from ..frontend.hooks import require_no_hooks
from ..frontend.tools.hub import local_folder
from ..frontend.weights.structural_copy import structural_copy
from ..ir.depth_map import DepthMap
from ..passes.base import Decisions
from ..passes.clean import Clean
from ..passes.decide import plan_conversion
from ..passes.inline_regions import InlineRegions
from ..passes.kinds import kind_of
from ..passes.pipeline import Timer, run
from ..passes.recipe import Recipe, make_recipe
from ..passes.split import FindDepth
from ..utils.rare_collections import rare_collections
from . import carving
from .measure_splits import Calibration, measure_splits
from .model import MoEModel
from .page.write import write_dense_page
from .report import Report
from .saving import checkpoint
from .verify import verify_conversion


def inspect(
    model: nn.Module, example_inputs: Any, html: str | os.PathLike | None,
    split: int | float | str, calibration: Calibration | None,
) -> DepthMap:  # fmt: skip
    """As `moe_rewrite.inspect`."""
    _require_dense(model)
    model = without_wrapper(model)
    curve = None if calibration is None else measure_splits(model, make_recipe(), calibration)
    if html is not None:
        return write_dense_page(html, model, example_inputs, split, curve)
    program = program_of(model, example_inputs)
    depth = run((InlineRegions(), Clean(), FindDepth()), program, Decisions("auto")).depth
    assert depth is not None
    return depth.measured(curve)


def convert(
    model: nn.Module, recipe: Recipe, example_inputs: Any, verify: bool, dry_run: bool = False,
    fits: bool = True, calibration: Calibration | None = None,
) -> MoEModel | Report:  # fmt: skip
    """As `moe_rewrite.convert`, by a recipe. fits: carved experts are fitted to calibration rows,
    and not loaded afterwards."""
    _require_dense(model)
    model = without_wrapper(model)
    try:
        # what is made here is trained elsewhere
        with torch.inference_mode(False), rare_collections():
            return _converted(model, recipe, example_inputs, verify, dry_run, fits, calibration)
    except (MoeRewriteError, MemoryError):
        raise
    except Exception as error:
        raise InvariantError(
            f"{type(model).__name__} could not be converted, for a reason that was not foreseen "
            f"({type(error).__name__}: {error}). This is a bug: please report it with this traceback"
        ) from error


def _converted(
    model: nn.Module, recipe: Recipe, example_inputs: Any, verify: bool, dry_run: bool,
    fits: bool, calibration: Calibration | None,
) -> MoEModel | Report:  # fmt: skip
    host, timed, curve = host_of(structural_copy(model)), Timer(), None
    require_no_hooks(model)
    if calibration is not None:
        curve = timed("measure splits", measure_splits, model, recipe, calibration)
        recipe = replace(recipe, split=curve.split)
    arguments = host.arguments(example_inputs)
    compiler, program = plan_conversion(host, recipe, arguments, timed)
    report = Report.of(program, compiler, curve)
    report.warn_of_costs(kind_of(recipe.experts).cheaper)
    if dry_run:
        return report
    program, emitted = compiler.emitted(program)
    kind = host.model_class(MoEModel)
    moe: MoEModel = kind(model, compiler, program, emitted, report, checked=verify)
    moe.adopt(arguments, program, emitted)
    if fits:
        timed("carve", carving.carve, moe)
    if verify:
        report.equivalence = timed("verify", verify_conversion, moe, arguments)
    return moe


def load(
    folder: str | os.PathLike, model: nn.Module, example_inputs: Any, verify: bool
) -> MoEModel:
    """As `moe_rewrite.load`."""
    _require_dense(model)
    model = without_wrapper(model)
    folder = local_folder(folder)
    facts, tensors = checkpoint.read(folder)
    checkpoint.require_base(facts, model)
    try:
        recipe = Recipe.from_dict(facts["recipe"])
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder}: the saved recipe is malformed: {error}") from None
    of_experts = checkpoint.Facts.of(folder, facts, recipe.num_experts)
    moe = convert(model, recipe, example_inputs, verify, fits=False)
    assert isinstance(moe, MoEModel)
    with torch.inference_mode(False):
        moe.restore(tensors, of_experts)
    return moe


def from_standard(folder: str | os.PathLike, model: nn.Module, verify: bool) -> MoEModel:
    """As `moe_rewrite.from_standard`."""
    require_package("transformers", "hf", "from_standard")
    from .saving import standard
    from .saving.standard_recipe import recipe_of

    _require_dense(model)
    model = without_wrapper(model)
    read, options = recipe_of(folder, getattr(model, "config", None))
    moe = convert(model, make_recipe(**options), None, verify)
    assert isinstance(moe, MoEModel)
    with torch.inference_mode(False):
        standard.restore(moe, read, folder, verify)
    return moe


def _require_dense(model: object) -> None:
    if isinstance(model, MoEModel):
        raise ConversionError(
            "this model is converted already: call expand() for more experts, or convert "
            "model.to_dense() anew"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")
