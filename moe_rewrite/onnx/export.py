"""export_onnx(): plain -> translate -> write -> check -> prove -> put in place."""

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

from ..errors import ConfigError, EquivalenceError
from .file.dtypes import KINDS
from .file.metadata import FORMAT
from .file.protobuf import large
from .file.skeleton import Skeleton
from .file.write import checked_path, digest, in_place, needs_external, set_metadata, write_model
from .lowerings.choose import LOWERINGS, Choice, Chosen
from .report import OnnxReport
from .trace.functional import Plain
from .translate import translate
from .verify.compare_with_torch import check_file, prove
from .verify.cuda_support import without_kernel
from .verify.reread import hold, write_twin

if TYPE_CHECKING:
    from ..converted.model import MoEModel

OPSETS = range(20, 24)
CASTS = (torch.float32, torch.float16, torch.bfloat16)
BITS = {"int8": 8, "int4": 4}
ONLY = {  # kinds of experts that have one form
    "LoRAExperts": ("dense", "stacked low rank, no shape depends on data"),
    "RegionExperts": ("sparse", "TopK, Gather and Scatter, groups of fixed size"),
}


def export(
    moe: MoEModel, path: str | os.PathLike, lowering: str, dtype: torch.dtype | str | None, opset: int,
    example_inputs: Any, cache: bool, external_data: bool | None, open_experts: bool,
    open_inputs: bool, verify: bool,
) -> OnnxReport:  # fmt: skip
    target, seconds = checked_path(path), {}
    cast, bits = _dtype(moe, dtype)
    choice = _choice(moe, lowering, bits, open_experts)
    if opset not in OPSETS:
        raise ConfigError(f"opset={opset!r}: expected {OPSETS[0]} to {OPSETS[-1]}")
    if any(p.is_meta for p in moe.parameters()):
        raise ConfigError("this model is on the meta device: load its weights before exporting it")

    def timed(name: str, run: Any, *args: Any) -> Any:
        start = time.perf_counter()
        made = run(*args)
        seconds[name] = time.perf_counter() - start
        return made

    if cast is not None:
        moe = _cast(moe, cast)
    plain = timed("capture", Plain, moe, example_inputs, cache, open_experts)
    if open_experts:
        plain.require_open()
    external = needs_external(plain.tensors, external_data)
    skeleton = timed("translate", translate, plain, opset, choice, open_inputs)
    if open_inputs:
        _open_inputs(skeleton, plain)
    report = _report(moe, plain, skeleton, target, bits, opset)
    _describe(skeleton, moe, plain, report)
    with in_place(target) as fresh:
        timed("write", write_model, skeleton, fresh, external)
        with _provable(skeleton, fresh) as (proven, shared):
            timed("check", check_file, proven)
            if verify:
                stand_ins = skeleton.stand_ins
                report.checks = timed("prove", prove, moe, plain, proven, stand_ins, shared)
        files = {p.name: p.stat().st_size for p in sorted(fresh.parent.iterdir())}
    return replace(report, files=files, seconds=seconds)


def _cast(moe: MoEModel, dtype: torch.dtype) -> MoEModel:
    """A copy, of whose weights there is never one in the old dtype."""
    kept = {id(t) for t in (*moe.router.parameters(), *moe.router.buffers())}
    made: dict[int, Any] = {}
    for old in (*moe.parameters(), *moe.buffers()):
        if old.is_floating_point() and id(old) not in kept:
            new = old.detach().to(dtype)
            is_parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
    return copy.deepcopy(moe, made).to(dtype)


@contextmanager
def _provable(skeleton: Skeleton, path: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """What to prove of a file, and the weights that ONNX Runtime is to take from memory: all large
    ones, without a copy. What is opened is the file as read back, but for their bytes; that these
    are the file's too is seen first. The skeleton's hold on its graph and weights ends: they may go."""
    skeleton.model, twin = onnx.ModelProto(), path.with_name(f"twin-{path.name}")
    try:
        places, weights = write_twin(path, twin), skeleton.weights
        if not hold(places, weights, path.parent):
            raise EquivalenceError(
                f"{path.name} does not hold the weights that were written to it: is the disk in "
                "order?"
            )
        skeleton.weights = {n: weights[n] for n, p in places.items() if large(p.length)}
        del weights
        yield twin, skeleton.weights
    finally:
        twin.unlink(missing_ok=True)


def _dtype(moe: MoEModel, asked: torch.dtype | str | None) -> tuple[torch.dtype | None, int | None]:
    """(dtype to cast to, bits of quantized experts' weights), each None where it stays."""
    name = str(asked).removeprefix("torch.")
    names = [str(c).removeprefix("torch.") for c in CASTS]
    if asked is None or name == str(moe.dtype).removeprefix("torch."):
        return None, None
    if name in BITS:
        return None, BITS[name]
    if name not in names:
        raise ConfigError(f"dtype={asked!r}: expected None or one of {', '.join([*names, *BITS])}")
    return getattr(torch, name), None


def _choice(moe: MoEModel, asked: str, bits: int | None, open_experts: bool) -> Choice:
    if asked not in LOWERINGS:
        raise ConfigError(f"lowering={asked!r}: expected {' or '.join(map(repr, LOWERINGS))}")
    kind = type(moe.recipe.experts).__name__
    if kind in ONLY:
        name, words = ONLY[kind]
        if asked not in ("auto", name):
            raise ConfigError(
                f"lowering={asked!r}: {kind} are written as {name!r} ({words}); use that or 'auto'"
            )
        if bits is not None:
            raise ConfigError(f"dtype='int{bits}': of FFNExperts only, this model has {kind}")
    elif open_experts and (asked != "auto" or bits is not None):
        raise ConfigError(
            f"open_experts=True with lowering={asked!r} or int8 or int4: feed-forward experts whose "
            "number may change have one form, of whole weights; leave both out"
        )
    return Choice(asked, bits, open_experts)


def _words(moe: MoEModel, chosen: dict[str, Chosen]) -> str:
    """What was chosen for which sites, and why."""
    kind = type(moe.recipe.experts).__name__
    if kind in ONLY:
        return ": ".join(ONLY[kind])
    sites: dict[Chosen, list[str]] = {}
    for name, how in chosen.items():
        sites.setdefault(how, []).append(name)
    words = [f"{how.lowering} ({how.why}): {', '.join(n)}" for how, n in sites.items()]
    return "; ".join(words) or "dense: no expert is on"


def _open_inputs(skeleton: Skeleton, plain: Plain) -> None:
    """Make the stacks of experts inputs with a default, which a call may override."""
    for name, stack in plain.stacks.items():
        if name not in skeleton.weights:
            continue
        tensor = skeleton.weights[name]
        shape: list[Any] = list(tensor.shape)
        shape[stack.dim] = "experts" if stack.each == 1 else f"{stack.each}*experts"
        value = onnx.helper.make_tensor_value_info(name, KINDS[tensor.dtype], shape)
        skeleton.model.graph.input.append(value)


def _report(
    moe: MoEModel,
    plain: Plain,
    skeleton: Skeleton,
    target: Path,
    bits: int | None,
    opset: int,
) -> OnnxReport:
    graph = skeleton.model.graph
    given = [i for i in graph.input if i.name not in plain.tensors]
    return OnnxReport(
        path=target.name, files={}, opset=opset, dtype=str(moe.dtype).removeprefix("torch.") + f", experts int{bits}" * bool(bits),
        lowering=_words(moe, skeleton.chosen), inputs={i.name: _dims(i) for i in given},
        outputs={o.name: _dims(o) for o in graph.output},
        experts=[moe.names[e] for e in plain.active],
        left_out=[n for e, n in enumerate(moe.names) if e not in plain.active],
        open_experts=bool(plain.stacks),
        operators=dict(Counter(_operator(n) for n in graph.node).most_common()),
        cpu_only=without_kernel(skeleton.model, skeleton.weights),
    )  # fmt: skip


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def base_of(plain: Plain) -> str:
    """What experts that are loaded later must have been trained on."""
    return digest({n: t for n, t in plain.tensors.items() if n not in plain.stacks})


def _describe(skeleton: Skeleton, moe: MoEModel, plain: Plain, report: OnnxReport) -> None:
    """Metadata: what a loader must know, and the reports of conversion and export."""
    conversion = moe.report
    recipe = replace(
        moe.recipe, split=moe._compiler.at, router=moe.router.spec, num_experts=moe.num_experts
    )
    set_metadata(
        skeleton.model,
        {
            "moe_rewrite.format": FORMAT,
            "moe_rewrite.model": conversion.model,
            "moe_rewrite.base": base_of(plain),
            "moe_rewrite.experts": report.experts,
            "moe_rewrite.stacks": {
                n: [s.dim, s.each] for n, s in plain.stacks.items() if n in skeleton.weights
            },
            "moe_rewrite.recipe": recipe.to_dict(),
            "moe_rewrite.conversion": {
                "split": conversion.split, "router": conversion.router,
                "sites": conversion.sites, "rejected": conversion.rejected,
                "numerics": conversion.numerics, "notes": conversion.notes,
                "equivalence": str(conversion.equivalence or "not checked"),
            },
            "moe_rewrite.export": {
                "lowering": report.lowering, "cpu_only": report.cpu_only, "left_out": report.left_out,
                "cache": any(n.startswith("past_key_values") for n in plain.inputs),
            },
        },
    )  # fmt: skip
    skeleton.model.producer_name = "moe_rewrite"
