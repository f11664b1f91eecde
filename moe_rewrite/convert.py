"""convert(): capture -> depth -> split -> freeze -> route -> insert experts -> emit -> verify."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from .config import Experts, Recipe, RouterSpec, make_recipe
from .converted import checkpoint
from .converted.model import MoEModel
from .converted.report import Report
from .converted.verify import verify_conversion
from .errors import CheckpointError, ConfigError, ConversionError
from .frontend.capture import is_hf, make_host
from .frontend.example_inputs import as_arguments
from .ir.depth_map import DepthMap
from .ir.program import Code
from .passes.emit import emit
from .passes.pipeline import Compiler
from .passes.split import find_depth


def inspect(model: nn.Module, example_inputs: Any = None) -> DepthMap:
    """The blocks of a model, where it can be cut, with parameters and FLOPs. Prints as a table.

    example_inputs: a tensor, tuple or dict; found by itself for Hugging Face models and where the
    first layer tells. Raises InputError where they cannot be inferred, CaptureError where the
    model cannot be captured.
    """
    _require_dense(model)
    compiler = Compiler(make_host(model), make_recipe())
    captured = compiler.dense(_arguments(model, example_inputs), "eval")
    depth = find_depth(captured, type(model).__name__).depth
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
    arguments = _arguments(model, example_inputs)
    compiler = Compiler(make_host(model), recipe)
    programs = compiler.decide(arguments)
    report = Report.of(programs[0], compiler)
    report.warn_of_costs()
    if dry_run:
        return report
    codes: dict[tuple, Code] = {}  # those of training and evaluation are mostly the same
    emitted = [compiler.timed("emit", emit, program, codes) for program in programs]
    moe = MoEModel(model, compiler, programs[0], emitted[0], report, checked=verify)
    for program, code in zip(programs, emitted, strict=True):
        moe.adopt(arguments, program, code)
    if verify:
        report.equivalence = compiler.timed("verify", verify_conversion, model, moe, arguments)
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
    names, expansions, classes = facts["names"], facts["expansions"], facts["classes"]
    trained = facts.get("trained")  # absent in saves of before there was such a flag
    well_formed = (
        len(set(map(str, names))) == recipe.num_experts
        and len(expansions) == recipe.num_experts
        and all(isinstance(n, str) for n in names)
        and all(isinstance(e, int) for e in expansions)
        and len(classes) in (0, recipe.num_experts)
        and all(isinstance(c, int) and 0 <= c < 10**6 for c in classes)
        and (trained is None or _is_flags(trained, recipe.num_experts))
    )
    if not well_formed:
        raise CheckpointError(f"{folder}: the saved names of experts are malformed: {names}")
    moe = _convert(model, recipe, example_inputs, verify)
    assert isinstance(moe, MoEModel)
    moe.restore(tensors, names, expansions, classes, trained)
    return moe


def _is_flags(given: Any, count: int) -> bool:
    return isinstance(given, list) and [type(x) for x in given] == [bool] * count


def _require_dense(model: object) -> None:
    if isinstance(model, MoEModel):
        raise ConversionError(
            "this model is converted already: call expand() for more experts, or convert "
            "model.to_dense() anew"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")


def _arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example call. It keeps no key-value cache: graphs that do come when they are asked for."""
    arguments = as_arguments(model, example_inputs)
    if not is_hf(model):
        return arguments
    from .frontend.huggingface import without_cache

    return without_cache(model, arguments)
