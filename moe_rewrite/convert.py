"""convert() and its kin: the package's interface. The work is `converted.build`'s, imported when
first called, so that `import moe_rewrite` and the command line's help cost nothing. An import after
PyTorch's would start a collection of garbage among all of PyTorch's objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .config import RouterSpec
from .utils.rare_collections import rare_collections

if TYPE_CHECKING:
    from torch import nn

    from .converted.model import MoEModel
    from .converted.report import Report
    from .ir.depth_map import DepthMap
    from .passes.recipe import Experts


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    html: str | os.PathLike | None = None,
    split: int | float | str = "auto",
    calibration: Mapping[str, Iterable[Any]] | None = None,
) -> DepthMap:
    """The blocks of a model, where it can be cut, with parameters and FLOPs. Prints as a table.

    model: a dense model.
    example_inputs: a tensor, tuple or dict of tensors with a batch dimension first; None infers
        them, for Hugging Face models and for modules whose first layer determines its input.
    html: also write a page to this file, which needs no network: for each split at a block, what
        lands on each side, what crosses the cut, and which sites take experts or why not.
    split: the one that the page shows first, as `convert` takes it.
    calibration: as for `convert`: also measure how well these tasks are told apart at every cut,
        ``depth.curve``, from which ``split="auto"`` follows.

    Raises what `convert` does for wrong calibration; ConfigError where the page cannot be written, InputError where inputs cannot be inferred,
    CaptureError where the model cannot be captured, SplitError where no output depends on both an
    input and a parameter.
    """
    with rare_collections():
        from .converted import build

    return build.inspect(model, example_inputs, html, split, calibration)


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
    calibration: Mapping[str, Iterable[Any]] | None = None,
) -> MoEModel | Report:
    """Convert a dense model to a mixture of experts that computes the same until it is trained.

    model: a dense model; its mode (training or evaluation) is the converted one's.
    mode: ``"pmoe"``: progressive experts and one router, at the cut (PMoE, arXiv 2407.21571);
        ``"upcycle"``: copies of each feed-forward region after the cut, and a router for each that
        takes two of them for a row (sparse upcycling, arXiv 2212.05055); ``"carve"``: each
        feed-forward's own hidden units, of which a token runs a share (see `CarvedExperts`).
    split: block index, negative index, fraction of FLOPs, dotted name of the first deep module, or
        ``"auto"`` (by `calibration`, else half of the FLOPs; 0 in mode "carve"). Blocks 0..split-1
        are shallow, and frozen.
    router: ``"auto"``, ``"token"``, ``"patch"``, a TokenRouter or a PatchRouter. ``"auto"`` routes
        patches of a feature map; in a sequence its gate reads the prefix if the model is causal,
        else the whole sequence. With LoRA experts, one to begin with, and a frozen base that gate
        is solved in closed form (``fit="analytic"``): in training mode the newest expert gets every
        row, ``eval()`` solves the router, and `MoEModel.remember` tells it what the model did before.
    experts: LoRAExperts, FFNExperts, CarvedExperts, or RegionExperts for patches; None: the mode's
        own.
    num_experts: experts to begin with; None means one, or eight in mode "upcycle" and "carve".
    example_inputs: as for `inspect`.
    backend: how experts are computed. ``"auto"``: at every site the fastest form, by a cost model;
        ``"dense"``: every expert on every row; ``"grouped"``: each expert on its own rows, both
        only where they fit; ``"reference"``: without fused operations.
    verify: compare the converted graphs' outputs with the model's, here and on later calls.
    dry_run: return only the Report.
    batch_norm: ``"frozen"`` keeps the statistics in training, ``"update"`` trains as the original.
    freeze: False trains copies of the dense weights too, with no segment held in eval mode; None
        means False in mode "upcycle", else True.
    calibration: for ``split="auto"``: by the name of a task, a list of its batches in the form of
        `example_inputs`; two tasks or more, a dozen samples of each. A router in closed form is
        solved at every possible cut on three quarters of the samples, and asked which task the others
        are of; the cut is the earliest at which it is about as often right as anywhere
        (`SplitCurve.chosen`), since what comes after the cut can be adapted. ``moe.report.curve``
        shows it.

    The model itself is never changed, and no frozen weight is copied. Raises ConfigError for a
    wrong option, InputError, CaptureError, SplitError, ConversionError where no site can hold
    experts, or EquivalenceError; nothing is left half done.
    """
    with rare_collections():
        from .converted import build
        from .passes.recipe import make_recipe, require_trainable

    recipe = make_recipe(mode, split, router, experts, num_experts, backend, batch_norm, freeze)
    require_trainable(recipe)
    return build.convert(model, recipe, example_inputs, verify, dry_run, calibration=calibration)


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
    with rare_collections():
        from .converted import build

    return build.load(folder, model, example_inputs, verify)


def from_standard(folder: str | os.PathLike, model: nn.Module, verify: bool = True) -> MoEModel:
    """Convert `model` to what a folder of a standard class holds, and load its weights: the inverse
    of `MoEModel.save_standard`.

    folder: a checkpoint of Mixtral, Qwen3-MoE, Qwen2-MoE, GLM-4-MoE or OLMoE, whose dense form
        `model` is; shared experts, if it has any, of the dense feed-forward's width.
    model: a dense model of the sizes of the one that was converted; its weights are not used.
    verify: compare the logits of both.

    Raises CheckpointError for a folder of another form or model; otherwise as `convert`.
    """
    with rare_collections():
        from .converted import build

    return build.from_standard(folder, model, verify)
