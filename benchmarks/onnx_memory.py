"""Peak memory of export_onnx() as a multiple of the weights: on both sides those of the converted
model, and those of the dense one behind it that are not shared.

``python -m benchmarks.onnx_memory [--quick]``: a fresh process for each kind, in which a tiny model
was exported before, so that what the libraries take at first use is not the export's. The proof in
ONNX Runtime is part of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

import moe_rewrite
from moe_rewrite import MoEModel

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb
from .conversion import llama
from .features import llama as small_llama

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({"num_experts": 4}, {}),
    "LoRA, weights beside": ({"num_experts": 4}, {"external_data": True}),
    "upcycled, sparse": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "sparse"}),
    "upcycled, contrib": ({"mode": "upcycle", "num_experts": 4}, {"lowering": "contrib"}),
}


def held_mb(moe: MoEModel) -> float:
    """Of the converted model, and of what the dense one behind it does not share with it."""
    parameters = [*moe.parameters(), *moe.to_dense().parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
    return sum(s.nbytes() for s in storages.values()) / 1e6


def measured(kind: str, size: str) -> dict[str, Any]:
    conversion, options = KINDS[kind]

    def converted(model: Any) -> MoEModel:
        return cast(MoEModel, moe_rewrite.convert(model, split=0.5, verify=False, **conversion))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        moe_rewrite.export_onnx(converted(small_llama(2, 32)), path, **options)
        before = memory_mb("VmRSS")
        moe = converted(llama(size))
        weights = held_mb(moe)
        forget_peak()
        report = moe_rewrite.export_onnx(moe, path, **options)
        peak = memory_mb("VmHWM") - before
    return {"weights_mb": weights, "peak_mb": peak, "ratio": peak / weights, "seconds": report.seconds}  # fmt: skip


def main() -> None:
    if "--task" in sys.argv:
        import json

        torch.set_num_threads(2)
        kind, size = sys.argv[-2:]
        print(json.dumps(measured(kind, size)))
        return
    size = "100MB" if arguments(__doc__ or "").quick else "400MB"
    found = {k: in_fresh_process("benchmarks.onnx_memory", k, size) for k in KINDS}
    rows = [
        (k, f"{f['weights_mb']:.0f} MB", f"{f['peak_mb']:.0f} MB", f"{f['ratio']:.2f}")
        for k, f in found.items()
    ]
    finish("onnx_memory", ["", "weights", "peak", "ratio"], rows, cells=found)


if __name__ == "__main__":
    main()
