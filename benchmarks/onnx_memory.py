"""Peak memory of export_onnx() as a multiple of the weights: on both sides those of the converted
model, and those of the dense one behind it that are not shared. Peak: from before the dense model was
made, so that what its conversion leaves counts. Export: what the export adds to what is held when it
begins, and the weights. Beside it, on the dense model and without any proof: PyTorch's own exporter,
and its trace alone, which a conversion needs, too: what that takes does not shrink with the weights.

``python -m benchmarks.onnx_memory [--quick]``: a fresh process for each, in which a tiny model was
exported before, so that what the libraries take at first use is not the export's. The proof in
ONNX Runtime is part of export_onnx().
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.onnx.trace import quiet

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb
from .conversion import llama
from .features import llama as small_llama

SMALL = "30MB"
PYTORCH = "dense, torch.onnx.export"
TRACE = "dense, torch.export alone"
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({"num_experts": 4}, {}),
    "LoRA, weights beside": ({"num_experts": 4}, {"external_data": True}),
    "LoRA, with its cache": ({"num_experts": 4}, {"cache": True}),
    "LoRA, as float16": ({"num_experts": 4}, {"dtype": "float16"}),
    "upcycled, sparse": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "sparse"}),
    "upcycled, contrib": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "contrib"}),
}


def held_mb(moe: MoEModel) -> float:
    """Of the converted model, and of what the dense one behind it does not share with it."""
    parameters = [*moe.parameters(), *moe.to_dense().parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
    return sum(s.nbytes() for s in storages.values()) / 1e6


def measured(kind: str, size: str) -> dict[str, float]:
    """Weights, and the peak of a process in MB (1e6 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        _prepared(kind, small_llama(2, 32))[1](path)
        before = memory_mb("VmRSS")
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
    if kind in DENSE:
        weights = sum(p.nbytes for p in model.parameters()) / 1e6
        return weights, partial(DENSE[kind], model)
    conversion, options = KINDS[kind]
    moe = cast(MoEModel, moe_rewrite.convert(model, split=0.5, verify=False, **conversion))
    return held_mb(moe), lambda path: moe_rewrite.export_onnx(moe, path, **options)


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


def _traced(model: Any, _: Path) -> None:
    with quiet():
        torch.export.export(model, (), **_call(model))


DENSE = {PYTORCH: _by_pytorch, TRACE: _traced}


def main() -> None:
    if "--task" in sys.argv:
        torch.set_num_threads(2)
        print(json.dumps(measured(*sys.argv[-2:])))
        return
    quick = arguments(__doc__ or "").quick
    cells = [("LoRA", SMALL), (PYTORCH, SMALL)]
    if not quick:
        cells += [(k, SMALL) for k in list(KINDS)[1:]] + [(TRACE, SMALL), (TRACE, "4MB")]
        sizes = ("4MB", "10MB", "20MB", "60MB", "100MB", "400MB", "24 layers")
        cells += [(k, s) for s in sizes for k in (*KINDS, PYTORCH)]
    found = {f"{k}, {s}": in_fresh_process("benchmarks.onnx_memory", k, s) for k, s in track(cells)}
    rows = [
        (
            k, f"{f['weights_mb']:.0f} MB", f"{f['peak_mb']:.0f} MB", f"{f['ratio']:.2f}",
            f"{f['export_ratio']:.2f}", f"{f['seconds']:.1f} s",
        )
        for k, f in found.items()
    ]  # fmt: skip
    finish("onnx_memory", ["", "weights", "peak", "peak/w", "export/w", "time"], rows, cells=found)


if __name__ == "__main__":
    main()
