"""Peak memory of export_onnx() as a multiple of the weights: on both sides those of the converted
model, and those of the dense one behind it that are not shared. Peak: from before the dense model was
made, so that what its conversion leaves counts. Export: what the export adds to what is held when it
begins, and the weights. Beside it, on the dense model and without any proof, PyTorch's own exporter.

Rows "nothing but the proof's runs" are what no exporter can do without that holds its whole file against
the model in ONNX Runtime: in a process that converts and exports no other model than the tiny one, the dense model and the
experts' weights (each once, and once more in 16 bits where they are cast), a session on them of a
file that another process wrote, and a call of each.

``python -m benchmarks.onnx_memory [--quick]``: a fresh process for each, in which a tiny model was
exported before, so that what the libraries take at first use is not the export's. The proof in
ONNX Runtime is part of export_onnx().
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from rich.progress import track

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.frontend.trace_memory import low_memory_export, release_memory
from moe_rewrite.onnx.file.protobuf import large
from moe_rewrite.onnx.runtime.session import FRUGAL, open_session, run
from moe_rewrite.onnx.trace.torch_export import quiet
from moe_rewrite.onnx.verify.late_casts import late_casts

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb, save
from .conversion import llama
from .features import llama as small_llama

SMALL, WRITE = "30MB", "write"
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
    """Of the converted model, and of what the dense one behind it does not share with it."""
    parameters = [*moe.parameters(), *moe.to_dense().parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
    return sum(s.nbytes() for s in storages.values()) / 1e6


def measured(kind: str, size: str) -> dict[str, float]:
    """Weights, and the peak of a process in MB (1e6 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        if kind.endswith(FLOOR):
            in_fresh_process("benchmarks.onnx_memory", WRITE, kind, size, str(path))
        _prepared(kind.removesuffix(FLOOR), small_llama(2, 32))[1](Path(folder) / "warm.onnx")
        before = memory_mb("VmRSS")
        if kind.endswith(FLOOR):
            weights, export = _bare(kind, llama(size), path)
        else:
            weights, export = _prepared(kind, llama(size))
        held = memory_mb("VmRSS") - before
        forget_peak()
        start = time.perf_counter()
        export(path)
        seconds = time.perf_counter() - start
        peak = memory_mb("VmHWM") - before
    return {
        "weights_mb": weights, "peak_mb": peak, "ratio": peak / weights,
        "export_ratio": (peak - held + weights) / weights, "seconds": seconds,
    }  # fmt: skip


def _prepared(kind: str, model: Any) -> tuple[float, Callable[[Path], Any]]:
    """(MB of the weights, what exports them)."""
    if kind == PYTORCH:
        weights = sum(p.nbytes for p in model.parameters()) / 1e6
        return weights, partial(_by_pytorch, model)
    conversion, options = KINDS[kind]
    moe = cast(MoEModel, moe_rewrite.convert(model, split=0.5, verify=False, **conversion))
    return held_mb(moe), lambda path: moe_rewrite.export_onnx(moe, path, **options)


def _written(kind: str, size: str, path: str) -> dict[str, float]:
    """Export for another process, weights beside the file."""
    conversion, options = KINDS[kind.removesuffix(FLOOR)]
    moe = cast(MoEModel, moe_rewrite.convert(llama(size), split=0.5, verify=False, **conversion))
    moe_rewrite.export_onnx(moe, path, verify=False, external_data=True, **options)
    return {}


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
    """held: of no use here, but it must be there."""
    with late_casts(path, dtype) as (graph, given):
        session = open_session(graph, options=given, shared=shared, **FRUGAL)
    asked = {i.name: i.shape for i in session.get_inputs()}
    sizes = {n: [d if isinstance(d, int) else CALL.get(d, 2) for d in s] for n, s in asked.items()}
    ints = {n: torch.ones(sizes.pop(n), dtype=torch.int64) for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**ints, use_cache=False)
    run(session, ints | {n: torch.zeros(shape, dtype=dtype) for n, shape in sizes.items()})


def _call(model: Any) -> dict[str, Any]:
    """An example call without a cache, batch and length open."""
    model.config.use_cache = False
    ids = torch.randint(0, 100, (2, 8))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    return {"kwargs": given, "dynamic_shapes": dict.fromkeys(given, free)}


def _by_pytorch(model: Any, path: Path) -> None:
    with quiet():
        program = torch.onnx.export(
            model, (), dynamo=True, opset_version=20, verbose=False, **_call(model)
        )
        assert program is not None
        program.save(path)


def main() -> None:
    if "--task" in sys.argv:
        torch.set_num_threads(2)
        task, *given = sys.argv[sys.argv.index("--task") + 1 :]
        with low_memory_export():
            print(json.dumps(_written(*given) if task == WRITE else measured(task, *given)))
        return
    quick = arguments(__doc__ or "").quick
    cells = [("LoRA", SMALL), (PYTORCH, SMALL)]
    if not quick:
        cells += [(k, SMALL) for k in list(KINDS)[1:]]
        cells += [(k + FLOOR, s) for k, sizes in FLOORS.items() for s in sizes]
        cells += [(k, s) for s in SIZES for k in (*KINDS, PYTORCH) if k != BESIDE or s == "400MB"]
    found = {f"{k}, {s}": in_fresh_process("benchmarks.onnx_memory", k, s) for k, s in track(cells)}
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
