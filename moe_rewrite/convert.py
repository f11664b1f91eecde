"""convert(): what it does is the list of passes in `passes.pipeline`, on an evaluation graph.

capture -> inline regions -> clean -> depth -> split | sites | freeze -> route -> insert experts -> widen head ->
lower -> emit -> verify. At the bars `passes.decide` takes the decisions that later graphs follow;
training graphs are captured when the model is first trained.
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
from .errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    InvariantError,
    MoeRewriteError,
    require_package,
)  # fmt: skip
from .frontend.adapters import host_of, without_wrapper
from .frontend.capture import program_of
from .frontend.hooks import require_no_hooks
from .frontend.hub import local_folder
from .frontend.structural_copy import structural_copy
from .ir.depth_map import DepthMap
from .passes.base import Decisions
from .passes.clean import Clean
from .passes.decide import plan_conversion
from .passes.inline_regions import InlineRegions
from .passes.pipeline import Timer, run
from .passes.recipe import Experts, Recipe, make_recipe, require_trainable
from .passes.split import FindDepth


def inspect(model: nn.Module, example_inputs: Any = None) -> DepthMap:
    """The blocks of a model, where it can be cut, with parameters and FLOPs. Prints as a table.

    example_inputs: a tensor, tuple or dict of tensors with a batch dimension first; None infers
        them, for Hugging Face models and for modules whose first layer determines its input.

    Raises InputError where inputs cannot be inferred, CaptureError where the model cannot be
    captured, SplitError where no output depends on both an input and a parameter.
    """
    _require_dense(model)
    program = program_of(without_wrapper(model), example_inputs)
    depth = run((InlineRegions(), Clean(), FindDepth()), program, Decisions("auto")).depth
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

    mode: ``"pmoe"``: progressive experts and one router, at the cut (PMoE, arXiv 2407.21571);
        ``"upcycle"``: copies of each feed-forward region after the cut, and a router for each that
        takes two of them for a row (sparse upcycling, arXiv 2212.05055).
    split: block index, negative index, fraction of FLOPs, dotted name of the first deep module, or
        ``"auto"`` (half of the FLOPs). Blocks 0..split-1 are shallow, and frozen.
    router: ``"auto"``, ``"token"``, ``"patch"``, a TokenRouter or a PatchRouter. ``"auto"`` routes
        patches of a feature map; in a sequence its gate reads the prefix if the model is causal,
        else the whole sequence.
    experts: LoRAExperts, FFNExperts, or RegionExperts for patches; None: the mode's own.
    num_experts: experts to begin with; None means one, or eight in mode "upcycle".
    example_inputs: as for `inspect`.
    backend: how experts are computed. ``"auto"``: at every site the fastest form, by a cost model;
        ``"dense"``: every expert on every row; ``"grouped"``: each expert on its own rows, both
        only where they fit; ``"reference"``: without fused operations.
    verify: compare the converted graphs' outputs with the model's, here and on later calls.
    dry_run: return only the Report.
    batch_norm: ``"frozen"`` keeps the statistics in training, ``"update"`` trains as the original.
    freeze: False trains copies of the dense weights too, with no segment held in eval mode; None
        means False in mode "upcycle", else True.

    The model itself is never changed, and no frozen weight is copied. Raises ConfigError for a
    wrong option, InputError, CaptureError, SplitError, ConversionError where no site can hold
    experts, or EquivalenceError; nothing is left half done.
    """
    recipe = make_recipe(mode, split, router, experts, num_experts, backend, batch_norm, freeze)
    require_trainable(recipe.router)
    return _convert(model, recipe, example_inputs, verify, dry_run)


def _convert(
    model: nn.Module, recipe: Recipe, example_inputs: Any, verify: bool, dry_run: bool = False
) -> MoEModel | Report:
    _require_dense(model)
    model = without_wrapper(model)
    try:
        return _converted(model, recipe, example_inputs, verify, dry_run)
    except (MoeRewriteError, MemoryError):
        raise
    except Exception as error:
        raise InvariantError(
            f"{type(model).__name__} could not be converted, for a reason that was not foreseen "
            f"({type(error).__name__}: {error}). This is a bug: please report it with this traceback"
        ) from error


def _converted(
    model: nn.Module, recipe: Recipe, example_inputs: Any, verify: bool, dry_run: bool
) -> MoEModel | Report:
    host, timed = host_of(structural_copy(model)), Timer()
    require_no_hooks(model)
    arguments = host.arguments(example_inputs)
    compiler, program = plan_conversion(host, recipe, arguments, timed)
    report = Report.of(program, compiler)
    report.warn_of_costs()
    if dry_run:
        return report
    program, emitted = compiler.emitted(program)
    kind = host.model_class(MoEModel)
    moe: MoEModel = kind(model, compiler, program, emitted, report, checked=verify)
    moe.adopt(arguments, program, emitted)
    if verify:
        report.equivalence = timed("verify", verify_conversion, moe, arguments)
    return moe


def load(
    folder: str | os.PathLike, model: nn.Module, example_inputs: Any = None, verify: bool = True
) -> MoEModel:
    """Convert `model` as the saved one was, and load the saved experts and router.

    folder: written by `MoEModel.save_pretrained`; or ``"user/repo"`` on the Hugging Face Hub.
    model: the dense model that was converted, with the same weights.
    example_inputs, verify: as for `convert`.

    The folder is checked before the model is converted. Raises CheckpointError for a missing,
    truncated or changed file, an unknown version, or another base model; otherwise as `convert`.
    """
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
    moe = _convert(model, recipe, example_inputs, verify)
    assert isinstance(moe, MoEModel)
    moe.restore(tensors, of_experts)
    return moe


def from_standard(folder: str | os.PathLike, model: nn.Module, verify: bool = True) -> MoEModel:
    """Convert `model` to what a folder of a standard class holds, and load its weights: the inverse
    of `MoEModel.save_standard`.

    folder: a checkpoint of Mixtral, Qwen3-MoE, Qwen2-MoE, GLM-4-MoE or OLMoE without shared experts
        (or with ones that add nothing), whose dense form `model` is.
    model: a dense model of the sizes of the one that was converted; its weights are not used.
    verify: compare the logits of both.

    Raises CheckpointError for a folder of another form or model; otherwise as `convert`.
    """
    require_package("transformers", "hf", "from_standard")
    from .converted import standard

    _require_dense(model)
    model = without_wrapper(model)
    read, options = standard.recipe_of(folder)
    moe = _convert(model, make_recipe(**options), None, verify)
    assert isinstance(moe, MoEModel)
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
