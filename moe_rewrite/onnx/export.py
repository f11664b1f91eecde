"""export_onnx(): capture -> translate -> write -> check -> compare with PyTorch -> move to path."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from ..errors import EquivalenceError
from ..passes.kinds import kind_of
from ..utils.quantized import is_quantized
from .file.dtypes import KINDS
from .file.metadata import FORMAT
from .file.protobuf import large
from .file.skeleton import Skeleton
from .file.write import checked_path, digest, in_place, needs_external, set_metadata, write_model
from .lowerings.choose import Chosen
from .options import ExportOptions
from .report import OnnxReport
from .trace.dynamic_dims import require_any_size
from .trace.functional import FunctionalModel
from .translate import translate
from .verify.compare_with_torch import check_file, compare_with_torch
from .verify.cuda_support import without_kernel
from .verify.reread import weights_match, write_external_view

if TYPE_CHECKING:
    from ..converted.model import MoEModel


def export(moe: MoEModel, path: str | os.PathLike, options: ExportOptions) -> OnnxReport:
    target, seconds = checked_path(path), {}
    options.check(moe)

    def timed(name: str, run: Any, *args: Any) -> Any:
        start = time.perf_counter()
        made = run(*args)
        seconds[name] = time.perf_counter() - start
        return made

    cast, choice, bits = options.cast(moe), options.choice(moe), options.bits
    if cast is not None:
        moe = _cast(moe, cast)
    given = options.example_inputs, options.cache, options.open_experts
    functional = timed("capture", FunctionalModel, moe, *given)
    require_any_size(functional)
    if options.open_experts:
        functional.require_open()
    external = needs_external(functional.tensors, options.external_data)
    opset, open_inputs = options.opset, options.open_inputs
    skeleton = timed("translate", translate, functional, opset, choice, open_inputs)
    if open_inputs:
        _open_inputs(skeleton, functional)
    report = _report(moe, functional, skeleton, target, bits, opset)
    _describe(skeleton, moe, functional, report)
    with in_place(target) as fresh:
        timed("write", write_model, skeleton, fresh, external)
        with _provable(skeleton, fresh) as (proven, shared):
            timed("check", check_file, proven)
            if options.verify:
                stand_ins = skeleton.stand_ins
                report.checks = timed(
                    "prove", compare_with_torch, moe, functional, proven, stand_ins, shared
                )
        files = {p.name: p.stat().st_size for p in sorted(fresh.parent.iterdir())}
    return replace(report, files=files, seconds=seconds)


def _cast(moe: MoEModel, dtype: torch.dtype) -> MoEModel:
    """A cast copy; weights are cast one by one, so no copy in the old dtype is made. Experts keep
    their dtype, and are shared."""
    sites = [site for site in moe.expert_sites() if site.computes]
    own = {id(p): p for site in sites for p in site.parameters()}
    kept = {id(t) for t in (*moe.router.parameters(), *moe.router.buffers())}
    made: dict[int, Any] = dict(own)
    for old in (*moe.parameters(), *moe.buffers()):
        if old.is_floating_point() and id(old) not in kept | own.keys():
            new = old.detach().to(dtype)
            is_parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
    return copy.deepcopy(moe, made).to(dtype)


@contextmanager
def _provable(skeleton: Skeleton, path: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """(a file to verify, weights that ONNX Runtime takes from memory instead of from the file).

    The file is a reread copy of the one at `path` without the bytes of large weights, which are
    compared with those in memory first. So no large weight is in memory twice. The skeleton drops
    its graph and weights, so that they can be freed.
    """
    skeleton.model, twin = onnx.ModelProto(), path.with_name(f"twin-{path.name}")
    try:
        ranges, weights = write_external_view(path, twin), skeleton.weights
        if not weights_match(ranges, weights, path.parent):
            raise EquivalenceError(
                f"{path.name} does not hold the weights that were written to it: check the disk"
            )
        skeleton.weights = {n: weights[n] for n, p in ranges.items() if large(p.length)}
        del weights
        yield twin, skeleton.weights
    finally:
        twin.unlink(missing_ok=True)


def _words(moe: MoEModel, chosen: dict[str, Chosen]) -> str:
    """Text for the report: the lowering of each site, and why."""
    only = kind_of(moe.recipe.experts).onnx
    if only is not None:
        return ": ".join(only)
    sites: dict[Chosen, list[str]] = {}
    for name, how in chosen.items():
        sites.setdefault(how, []).append(name)
    words = [f"{how.lowering} ({how.why}): {', '.join(n)}" for how, n in sites.items()]
    return "; ".join(words) or "dense: no expert is on"


def _open_inputs(skeleton: Skeleton, functional: FunctionalModel) -> None:
    """Make the stacks of experts inputs with a default that a call may override."""
    for name, stack in functional.stacks.items():
        if name not in skeleton.weights:
            continue
        tensor = skeleton.weights[name]
        shape: list[Any] = list(tensor.shape)
        shape[stack.dim] = "experts" if stack.each == 1 else f"{stack.each}*experts"
        value = onnx.helper.make_tensor_value_info(name, KINDS[tensor.dtype], shape)
        skeleton.model.graph.input.append(value)


def _report(
    moe: MoEModel,
    functional: FunctionalModel,
    skeleton: Skeleton,
    target: Path,
    bits: int | None,
    opset: int,
) -> OnnxReport:
    graph = skeleton.model.graph
    given = [i for i in graph.input if i.name not in functional.tensors]
    return OnnxReport(
        path=target.name, files={}, opset=opset, dtype=_dtype(moe, bits),
        lowering=_words(moe, skeleton.chosen), inputs={i.name: _dims(i) for i in given},
        outputs={o.name: _dims(o) for o in graph.output},
        experts=[moe.names[e] for e in functional.active],
        left_out=[n for e, n in enumerate(moe.names) if e not in functional.active],
        open_experts=bool(functional.stacks),
        operators=dict(Counter(_operator(n) for n in graph.node).most_common()),
        cpu_only=without_kernel(skeleton.model, skeleton.weights),
    )  # fmt: skip


def _dtype(moe: MoEModel, bits: int | None) -> str:
    """Text for the report: how weights are stored in the file."""
    said = [str(moe.dtype).removeprefix("torch.")]
    said += [f"experts int{bits}"] if bits else []
    said += ["base dequantised"] if any(map(is_quantized, moe.parameters())) else []
    return ", ".join(said)


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def base_of(functional: FunctionalModel) -> str:
    """Digest of the frozen weights; experts that are loaded later must have the same."""
    return digest({n: t for n, t in functional.tensors.items() if n not in functional.stacks})


def _describe(
    skeleton: Skeleton, moe: MoEModel, functional: FunctionalModel, report: OnnxReport
) -> None:
    """Set the metadata: what a loader needs, and the reports of conversion and export."""
    conversion = moe.report
    set_metadata(
        skeleton.model,
        {
            "moe_rewrite.format": FORMAT,
            "moe_rewrite.model": conversion.model,
            "moe_rewrite.base": base_of(functional),
            "moe_rewrite.experts": report.experts,
            "moe_rewrite.stacks": {
                n: [s.dim, s.each] for n, s in functional.stacks.items() if n in skeleton.weights
            },
            "moe_rewrite.largest": functional.largest,
            "moe_rewrite.recipe": moe.recipe.to_dict(),
            "moe_rewrite.conversion": {
                "split": conversion.split, "router": conversion.router,
                "sites": conversion.sites, "rejected": conversion.rejected,
                "numerics": conversion.numerics, "notes": conversion.notes,
                "equivalence": str(conversion.equivalence or "not checked"),
            },
            "moe_rewrite.export": {
                "lowering": report.lowering, "cpu_only": report.cpu_only, "left_out": report.left_out,
                "cache": any(functional.cached),
            },
        },
    )  # fmt: skip
    skeleton.model.producer_name = "moe_rewrite"
