"""convert(): what it does is the list of passes in `passes.pipeline`, on two graphs of the model.

capture -> clean -> depth -> split | sites | freeze -> route -> insert experts -> widen head ->
lower -> emit -> verify. At the bars `passes.decide` takes the decisions that later graphs follow.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from .config import RouterSpec
from .converted import checkpoint
from .converted.model import MoEModel
from .converted.report import Report
from .converted.verify import verify_conversion
from .errors import CheckpointError, ConfigError, ConversionError
from .frontend.adapters import host_of
from .frontend.capture import program_of
from .frontend.structural_copy import structural_copy
from .ir.depth_map import DepthMap
from .ir.program import Code
from .passes.base import Decisions
from .passes.clean import Clean
from .passes.decide import plan_conversion
from .passes.emit import emit
from .passes.pipeline import Timer, run
from .passes.recipe import Experts, Recipe, make_recipe
from .passes.split import FindDepth


def inspect(model: nn.Module, example_inputs: Any = None) -> DepthMap:
    """The blocks of a model, where it can be cut, with parameters and FLOPs. Prints as a table.

    example_inputs: a tensor, tuple or dict; found by itself for Hugging Face models and where the
    first layer tells. Raises InputError where they cannot be inferred, CaptureError where the
    model cannot be captured.
    """
    _require_dense(model)
    program = program_of(model, example_inputs)
    depth = run((Clean(), FindDepth()), program, Decisions("auto")).depth
    assert depth is not None
    return depth


def convert(
    model: nn.Module,
    mode: str = "pmoe",
    split: int | float | str = "auto",
    router: str | RouterSpec = "auto",
    experts: Experts | None = None,
    num_experts: int | None = None,
    example_inputs: Any = None,
    backend: str = "auto",
    verify: bool = True,
    dry_run: bool = False,
    batch_norm: str = "frozen",
    freeze: bool | None = None,
) -> MoEModel | Report:
    """Convert a dense model to a mixture of experts that computes the same until it is trained.

    mode: ``"pmoe"``, progressive experts behind one router at the cut; ``"upcycle"``, sparse
        upcycling: copies of each feed-forward region behind the cut, each row going to two.
    split: block index, negative index, fraction of FLOPs, dotted name of the first deep module, or
        ``"auto"``. Blocks 0..split-1 are frozen and shallow.
    router: ``"auto"`` (patches of a feature map; of a sequence the prefix for causal models, else
        all of it), ``"token"``, ``"patch"``, a TokenRouter or a PatchRouter.
    experts: LoRAExperts, FFNExperts, or RegionExperts for patches. num_experts: to begin with;
        None is one, or eight in upcycling.
    example_inputs: see `inspect`. verify: run the converted graphs against the model.
    backend: ``"auto"`` takes for every site the cheapest of the forms that fit by a cost model,
        ``"dense"`` (every expert on every row) or ``"grouped"`` (each expert on its own rows) that
        one where it fits, ``"reference"`` none of the fused operations.
    dry_run: return the Report only. batch_norm: ``"frozen"`` keeps statistics in training,
        ``"update"`` trains as the original does. freeze: False, as upcycling has it, trains the
        dense weights too (on copies of their own), with no segment held in evaluation.

    The model itself is never changed, and no frozen weight is copied. Raises ConfigError, InputError,
    CaptureError, SplitError, ConversionError or EquivalenceError; nothing is left half done.
    """
    recipe = make_recipe(mode, split, router, experts, num_experts, backend, batch_norm, freeze)
    return _convert(model, recipe, example_inputs, verify, dry_run)


def _convert(
    model: nn.Module, recipe: Recipe, example_inputs: Any, verify: bool, dry_run: bool = False
) -> MoEModel | Report:
    _require_dense(model)
    host, timed = host_of(structural_copy(model)), Timer()
    arguments = host.arguments(example_inputs)
    compiler, programs = plan_conversion(host, recipe, arguments, timed)
    report = Report.of(programs[0], compiler)
    report.warn_of_costs()
    if dry_run:
        return report
    codes: dict[tuple, Code] = {}  # those of training and evaluation are mostly the same
    emitted = [timed("emit", emit, program, codes) for program in programs]
    moe = MoEModel(model, compiler, programs[0], emitted[0], report, checked=verify)
    for program, code in zip(programs, emitted, strict=True):
        moe.adopt(arguments, program, code)
    if verify:
        report.equivalence = timed("verify", verify_conversion, model, moe, arguments)
    return moe


def load(
    folder: str | os.PathLike, model: nn.Module, example_inputs: Any = None, verify: bool = True
) -> MoEModel:
    """Convert `model` as the saved one was, and fill in the saved experts and router.

    The folder is checked before the model is touched. Raises CheckpointError for a missing,
    truncated or tampered file, an unknown version, or another base model.
    """
    _require_dense(model)
    facts, tensors = checkpoint.read(folder)
    checkpoint.require_base(facts, model)
    try:
        recipe = Recipe.from_dict(facts["recipe"])
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder}: the saved recipe is malformed: {error}") from None
    of_experts = checkpoint.Facts.of(folder, facts, recipe.num_experts)
    moe = _convert(model, recipe, example_inputs, verify)
    assert isinstance(moe, MoEModel)
    moe.restore(tensors, of_experts)
    return moe


def _require_dense(model: object) -> None:
    if isinstance(model, MoEModel):
        raise ConversionError(
            "this model is converted already: call expand() for more experts, or convert "
            "model.to_dense() anew"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")
