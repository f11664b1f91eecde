"""Equivalence: the converted model's outputs compared with the dense model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import EquivalenceError
from ..frontend.adapters import host_of
from ..frontend.arguments import split_static
from ..frontend.example_inputs import random_arguments
from ..ir.equivalence import EquivalenceReport, compare, evaluating

if TYPE_CHECKING:
    from .model import MoEModel


def verify(model: nn.Module, moe: MoEModel, inputs: Any) -> EquivalenceReport:
    """Run both models in eval mode on these inputs (tensor, tuple or dict) and compare outputs.

    The tolerance follows from the numerics that the passes declare (`ir.equivalence.TOLERANCE`);
    experts that were trained make a difference. Positions that an attention_mask leaves out are
    not compared, nor are key-value caches. Each module's training flag is restored. Raises
    InputError for inputs that the model does not take.
    """
    arguments = host_of(model).arguments(inputs)
    outputs: list[list[Any]] = []
    for module in (model, moe):
        with torch.no_grad(), evaluating(module):
            outputs.append(pytree.tree_leaves(module(**arguments)))
    shapes = tuple(str(tuple(t.shape)) for t in pytree.tree_leaves(split_static(arguments)[0]))
    report = compare(outputs[0], outputs[1], arguments.get("attention_mask"), moe.report.numerics)
    return replace(report, shapes=shapes[:1])


def verify_conversion(
    model: nn.Module, moe: MoEModel, arguments: dict[str, Any]
) -> EquivalenceReport | None:
    """Compare a fresh conversion with its original at several batch sizes; raise on a difference.

    None for a model on the meta device, which computes nothing.
    """
    if any(p.is_meta for p in model.parameters()):
        return None
    reports = []
    for batch in (2, 1):
        given = random_arguments(arguments, host_of(model).vocabulary(), batch)
        if not _runs(model, given):
            given = arguments  # random content is not valid here: compare on the user's inputs
        with moe.dense_plan():
            reports.append(verify(model, moe, given))
        if not reports[-1].equal:
            raise EquivalenceError(
                f"the converted model differs from the original by {reports[-1].max_error:.2e}: "
                "please report this model; nothing was changed"
            )
    return EquivalenceReport(
        True, all(r.exact for r in reports), max(r.max_error for r in reports),
        max(r.rms_error for r in reports), tuple(s for r in reports for s in r.shapes),
    )  # fmt: skip


def _runs(model: nn.Module, arguments: dict[str, Any]) -> bool:
    try:
        with torch.no_grad(), evaluating(model):
            model(**arguments)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True
