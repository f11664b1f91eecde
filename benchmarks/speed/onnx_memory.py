"""Peak memory of export_onnx() as a multiple of the weights, beside PyTorch's own exporter."""

# python -m benchmarks.speed.onnx_memory [--quick]. Weights: on both sides those of the converted
# model, and those of the dense one that it was made of that are not shared. Peak: from before the dense
# model was made, so that what its conversion leaves counts. Export: what the export, its proof in ONNX
# Runtime included, adds to what is held when it begins, and the weights. PyTorch's exporter writes the
# dense model without any proof. Each cell has a fresh process, in which a tiny model was exported
# before, so that what the libraries take at first use is not the export's.
#
# Rows "nothing but the proof's runs" are what no exporter can do without that compares its whole file
# with the model in ONNX Runtime: in a process that converts and exports no other model than the tiny
# one, the dense model and the experts' weights (each once, and once more in 16 bits where they are
# cast), a session on them of a file that another process wrote, and a call of each.

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from rich.progress import track

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.frontend.tracing.trace_memory import low_memory_export, release_memory
from moe_rewrite.onnx.file.protobuf import large
from moe_rewrite.onnx.runtime.session import FRUGAL, open_session, run
from moe_rewrite.onnx.verify.late_casts import late_casts

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.memory import forget_peak, memory_now, peak_memory
from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import timed
from .conversion import SIZES as LLAMAS
from .forms.onnx_files import by_pytorch

SMALL = "30MB"
BESIDE = "LoRA, weights beside"
PYTORCH = "dense, torch.onnx.export"
FLOOR = ", nothing but the proof's runs"
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({"num_experts": 4}, {}),
    BESIDE: ({"num_experts": 4}, {"external_data": True}),
    "LoRA, with its cache": ({"num_experts": 4}, {"cache": True}),
    "LoRA, as float16": ({"num_experts": 4}, {"dtype": "float16"}),
    "upcycled, sparse": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "sparse"}),
    "upcycled, contrib": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "contrib"}),
}
SIZES = ("2MB", "4MB", "10MB", "15MB", "20MB", "100MB", "400MB", "24 layers")
FLOORS = {  # at sizes at which the export takes more than the goal, or not much less
    "LoRA": ("1MB", "2MB"), "LoRA, with its cache": ("2MB", "4MB"),
    "LoRA, as float16": ("2MB", "4MB", "10MB", "15MB"), "upcycled, contrib": ("2MB",),
}  # fmt: skip
CALL = {"sequence": 4, "past": 0, "past + sequence": 4}  # sizes; batch is 2


def held_mb(moe: MoEModel) -> float:
    """Weights of the converted model, and those of the dense one that it does not share."""
    parameters = [*moe.parameters(), *moe.to_dense().parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
    return sum(s.nbytes() for s in storages.values()) / 1e6


def measured(kind: str, size: str) -> dict[str, float]:
    """Weights, and the peak of a process in MB (1e6 bytes)."""
    floor = kind.endswith(FLOOR)
    with low_memory_export(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        if floor:
            in_fresh_process(write, kind, size, str(path))
        _prepared(kind.removesuffix(FLOOR), llama(2, 32))[1](Path(folder) / "warm.onnx")
        before, model = memory_now(), llama(*LLAMAS[size])
        weights, export = _bare(kind, model, path) if floor else _prepared(kind, model)
        del model
        held = memory_now() - before
        forget_peak()
        seconds = timed(lambda: export(path))[1]
        peak = peak_memory() - before
    return {
        "weights_mb": weights, "peak_mb": peak, "ratio": peak / weights,
        "export_ratio": (peak - held + weights) / weights, "seconds": seconds,
    }  # fmt: skip


def _prepared(kind: str, model: Any) -> tuple[float, Callable[[Path], Any]]:
    """(MB of the weights, what exports them)."""
    if kind == PYTORCH:
        weights = sum(p.nbytes for p in model.parameters()) / 1e6
        return weights, partial(by_pytorch, model, opset=20)
    conversion, options = KINDS[kind]
    moe = cast(MoEModel, moe_rewrite.convert(model, split=0.5, verify=False, **conversion))
    return held_mb(moe), lambda path: moe_rewrite.export_onnx(moe, path, **options)


def write(kind: str, size: str, path: str) -> None:
    """Export for another process, weights beside the file."""
    conversion, options = KINDS[kind.removesuffix(FLOOR)]
    with low_memory_export():
        made = moe_rewrite.convert(llama(*LLAMAS[size]), split=0.5, verify=False, **conversion)
        moe_rewrite.export_onnx(
            cast(MoEModel, made), path, verify=False, external_data=True, **options
        )


def _bare(kind: str, model: Any, path: Path) -> tuple[float, Callable[[Path], Any]]:
    """(MB of the weights in the model's dtype, what opens the file and runs it and the model)."""
    dtype = getattr(torch, KINDS[kind.removesuffix(FLOOR)][1].get("dtype", "float32"))
    held = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    names = set()
    for tensor in onnx.load(path).graph.initializer:
        names.add(tensor.name)
        if tensor.name not in held and large(len(tensor.raw_data)):
            value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            held[tensor.name] = value.to(model.dtype)
    shared = {n: t.to(dtype) for n, t in held.items() if n in names}
    shared = {n: t for n, t in shared.items() if large(t.nbytes)}
    del tensor
    gc.collect()
    release_memory()
    return sum(t.nbytes for t in held.values()) / 1e6, partial(
        _run_once, model, held, shared, dtype
    )


def _run_once(
    model: Any, held: Any, shared: dict[str, Any], dtype: torch.dtype, path: Path
) -> None:
    """held: not used, but must stay in memory."""
    with late_casts(path, dtype) as (graph, given):
        session = open_session(graph, options=given, shared=shared, **FRUGAL)
    asked = {i.name: i.shape for i in session.get_inputs()}
    sizes = {n: [d if isinstance(d, int) else CALL.get(d, 2) for d in s] for n, s in asked.items()}
    ints = {n: torch.ones(sizes.pop(n), dtype=torch.int64) for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**ints, use_cache=False)
    run(session, ints | {n: torch.zeros(shape, dtype=dtype) for n, shape in sizes.items()})


def main() -> None:
    torch.set_num_threads(2)
    if answer(measured, write):
        return
    quick = is_quick(__doc__)
    cells = [("LoRA", SMALL), (PYTORCH, SMALL)]
    if not quick:
        cells += [(k, SMALL) for k in list(KINDS)[1:]]
        cells += [(k + FLOOR, s) for k, sizes in FLOORS.items() for s in sizes]
        cells += [(k, s) for s in SIZES for k in (*KINDS, PYTORCH) if k != BESIDE or s == "400MB"]
    found = {f"{k}, {s}": in_fresh_process(measured, k, s) for k, s in track(cells)}
    rows = [
        (
            k, f"{f['weights_mb']:.0f} MB", f"{f['peak_mb']:.0f} MB", f"{f['ratio']:.2f}",
            f"{f['export_ratio']:.2f}", f"{f['seconds']:.1f} s",
        )
        for k, f in found.items()
    ]  # fmt: skip
    if not quick:
        save("onnx_memory", {"cells": found})
    finish("onnx_memory", ["", "weights", "peak", "peak/w", "export/w", "time"], rows, cells=found)


if __name__ == "__main__":
    main()
