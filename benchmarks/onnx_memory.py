"""Peak memory of export_onnx() as a multiple of the weights: on both sides those of the converted
model, and those of the dense one behind it that are not shared. Beside it, on the dense model and
without any proof: PyTorch's own exporter; its trace alone; and its trace and translation as they are
called here, weights as arguments of which none is copied, nothing written: what these take does not
shrink with the weights.

``python -m benchmarks.onnx_memory [--quick]``: a fresh process for each, in which a tiny model was
exported before, so that what the libraries take at first use is not the export's. The proof in
ONNX Runtime is part of export_onnx().
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.onnx.trace import onnx_program, quiet
from moe_rewrite.traces import collecting

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb
from .conversion import llama
from .features import llama as small_llama

SMALL = "30MB"
PYTORCH = "dense, torch.onnx.export"
BARE = "dense, traced as here without weights"
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
        forget_peak()
        export(path)
        peak = memory_mb("VmHWM") - before
    return {"weights_mb": weights, "peak_mb": peak, "ratio": peak / weights}


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


class _OfWeights(torch.nn.Module):
    """A model whose weights are arguments of the call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.held = (model,)  # in a tuple: its weights are not this module's

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        call = {"input_ids": input_ids, "attention_mask": attention_mask}
        return torch.func.functional_call(self.held[0], weights, (), call).logits


def _without_weights(model: Any, _: Path) -> None:
    call = _call(model)
    weights = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    shapes = (dict.fromkeys(weights), *call["dynamic_shapes"].values())
    with torch.no_grad(), collecting():
        onnx_program(_OfWeights(model), (weights, *call["kwargs"].values()), shapes, 20)


DENSE = {PYTORCH: _by_pytorch, BARE: _without_weights, TRACE: _traced}


def main() -> None:
    if "--task" in sys.argv:
        torch.set_num_threads(2)
        print(json.dumps(measured(*sys.argv[-2:])))
        return
    quick = arguments(__doc__ or "").quick
    cells = [("LoRA", SMALL), (PYTORCH, SMALL)]
    if not quick:
        own, lora = list(KINDS), list(KINDS)[:4]
        cells += [(k, SMALL) for k in own[1:]]
        cells += [(k, s) for k in (TRACE, BARE) for s in ("4MB", "20MB", SMALL)]
        cells += [(k, s) for s in ("4MB", "24 layers") for k in ("LoRA", PYTORCH)]
        cells += [(k, s) for s in ("20MB", "60MB") for k in (*lora, PYTORCH)]
        cells += [(k, s) for s in ("100MB", "400MB") for k in (*own, PYTORCH)]
    found = {f"{k}, {s}": in_fresh_process("benchmarks.onnx_memory", k, s) for k, s in track(cells)}
    rows = [
        (k, f"{f['weights_mb']:.0f} MB", f"{f['peak_mb']:.0f} MB", f"{f['ratio']:.2f}")
        for k, f in found.items()
    ]
    finish("onnx_memory", ["", "weights", "peak", "ratio"], rows, cells=found)


if __name__ == "__main__":
    main()
