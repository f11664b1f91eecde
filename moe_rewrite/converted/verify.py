"""Equivalence: the converted model's outputs compared with the dense model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, EquivalenceError, MoeRewriteError
from ..frontend.arguments import split_static
from ..frontend.choose_host import host_of, without_wrapper
from ..frontend.example_inputs import random_arguments
from ..frontend.weights.packed_weight import holds_packed
from ..frontend.weights.structural_copy import structural_copy, working_copy
from ..ir.equivalence import EquivalenceReport, compare, evaluating
from .dense_reference import clone, fresh

if TYPE_CHECKING:
    from .model import MoEModel


def verify(model: nn.Module, moe: MoEModel, inputs: Any) -> EquivalenceReport:
    """Run both models in eval mode on these inputs (tensor, tuple or dict) and compare outputs.

    The tolerance follows from the numerics that the passes declare (`ir.equivalence.TOLERANCE`);
    experts that were trained make a difference. Positions that an attention_mask leaves out are
    not compared, nor are key-value caches. Neither model is changed: of the dense one a copy of its
    structure and buffers runs. Raises InputError for inputs that the model does not take.
    """
    model = without_wrapper(model)
    if holds_packed(model):  # modules that write to their weights in a call
        model = structural_copy(model)
    arguments = host_of(model).arguments(inputs)
    written = moe.reference.written_names
    tensors = (*model.named_parameters(), *model.named_buffers())
    own = {id(t): clone(t) for n, t in tensors if n in written or not isinstance(t, nn.Parameter)}
    with torch.no_grad(), evaluating(copied := working_copy(model, own)):
        dense = pytree.tree_leaves(copied(**arguments))
    return _compared(dense, moe, arguments)


def verify_conversion(moe: MoEModel, arguments: dict[str, Any]) -> EquivalenceReport | None:
    """Compare a fresh conversion with its original at several batch sizes; raise on a difference.

    None for a model on the meta device, which computes nothing.
    """
    if moe.device.type == "meta":
        return None
    reports = []
    for batch in (2, 1):
        given = random_arguments(arguments, moe.host.vocabulary(), batch)
        try:
            reports.append(_compared_without_experts(moe, given))
        except (IndexError, RuntimeError, ValueError):  # random content is not valid here
            reports.append(_compared_or_refused(moe, arguments))
        if not reports[-1].equal:
            raise EquivalenceError(
                f"the converted model differs from the original by {reports[-1].max_error:.2e}: "
                "please report this model; nothing was changed. If that is rounding, which its "
                "layers amplify, convert with verify=False"
            )
    return EquivalenceReport(
        True, all(r.exact for r in reports), max(r.max_error for r in reports),
        max(r.rms_error for r in reports), tuple(s for r in reports for s in r.shapes),
    )  # fmt: skip


def _compared_or_refused(moe: MoEModel, arguments: dict[str, Any]) -> EquivalenceReport:
    try:
        return _compared_without_experts(moe, arguments)
    except MoeRewriteError:
        raise
    except Exception as error:  # the dense model ran on these inputs
        raise CaptureError(
            f"the graph captured of {moe.host.name} does not run: {type(error).__name__}: {error}. "
            "Another attention implementation (attn_implementation='eager') may be captured better"
        ) from error


def _compared_without_experts(moe: MoEModel, arguments: dict[str, Any]) -> EquivalenceReport:
    with moe.reference.keeping_outputs(), moe.dense_plan():  # a new graph's check asks for them too
        return _compared(moe.reference.outputs(arguments, "eval"), moe, arguments)


def _compared(dense: list[Any], moe: MoEModel, arguments: dict[str, Any]) -> EquivalenceReport:
    """A converted model's outputs compared with these of the dense model, in eval mode."""
    with torch.no_grad(), evaluating(moe):
        graph, _ = moe.graph_for(moe.normalized((), {k: fresh(v) for k, v in arguments.items()})[0])
        with moe.reference.restoring():
            ours = pytree.tree_leaves(moe(**{k: fresh(v) for k, v in arguments.items()}))
    shapes = tuple(str(tuple(t.shape)) for t in pytree.tree_leaves(split_static(arguments)[0]))
    computed = graph.emitted.computed
    report = compare(dense, ours, arguments.get("attention_mask"), moe.report.numerics, computed)
    return replace(report, shapes=shapes[:1])
