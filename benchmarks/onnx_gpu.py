"""Exported files on a GPU: ONNX Runtime's CUDA provider against PyTorch, for a machine that has one.

``python -m benchmarks.onnx_gpu [--quick] [--provider cpu]``, with ``pip install 'moe-rewrite[gpu]'``
in the place of the package onnxruntime. A converted Llama, LoRA experts and upcycled, in fp16 and
bf16: nodes left to the CPU, largest difference from PyTorch in fp32, milliseconds a call, the median
of calls in turn. ``--provider cpu`` runs the same in fp32 where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import FFNExperts, MoEModel

from .common import finish
from .features import llama
from .onnx import turns

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def models(quick: bool) -> dict[str, MoEModel]:
    layers, width = (2, 64) if quick else (8, 1024)
    made: dict[str, Any] = {
        "LoRA": moe_rewrite.convert(llama(layers, width), num_experts=4, split=layers // 2),
        "upcycled": moe_rewrite.convert(
            llama(layers, width), mode="upcycle", split=layers // 2, experts=FFNExperts(num=8)
        ),
    }
    for moe in made.values():
        with torch.no_grad():
            for row in moe.router.rows:
                row.normal_(0, 0.05)
    return made


def measured(
    moe: MoEModel, dtype: str, lowering: str, provider: str, folder: Path, tokens: tuple[int, ...]
) -> dict[int, dict[str, Any]]:
    """One file, with inputs of each length; what the provider cannot run says why."""
    path = folder / f"{dtype}-{lowering}.onnx"
    report = moe_rewrite.export_onnx(moe, path, lowering=lowering, dtype=dtype, verify=False)
    try:
        loaded = moe_rewrite.onnx.load(path, providers=[PROVIDERS[provider]])
    except Exception as error:  # ONNX Runtime's own classes have no base but this one
        return dict.fromkeys(tokens, {"refused": str(error).splitlines()[0]})
    used = loaded.session.get_providers()
    if PROVIDERS[provider] not in used:
        raise SystemExit(f"ONNX Runtime has {used} and no {PROVIDERS[provider]}")
    found = {}
    for count in tokens:
        ids = torch.randint(1, 1024, (1, count), generator=torch.Generator().manual_seed(0))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            want = moe.eval()(**given, use_cache=False).logits
        got = loaded(**given)["logits"].float()
        time = turns({"run": partial(loaded, **given)}, 3.0)["run"]
        error = float((got - want).abs().max() / want.abs().max())
        found[count] = {"cpu_only": report.cpu_only, "error": error, "milliseconds": time}
    return found


def row(name: str, cell: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in cell:
        return name, "refused", cell["refused"], ""
    left = ", ".join(cell["cpu_only"]) or "none"
    return name, f"{cell['milliseconds']:.2f} ms", f"{cell['error']:.1e}", left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller models")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cuda")
    given = parser.parse_args()
    dtypes = ("float16", "bfloat16") if given.provider == "cuda" else ("float32",)
    tokens = (1, 16) if given.quick else (1, 512)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, moe in models(given.quick).items():
            for lowering in ("auto", "contrib") if name == "upcycled" else ("auto",):
                for dtype in dtypes:
                    of = measured(moe, dtype, lowering, given.provider, Path(folder), tokens)
                    print(f"{name}, {lowering}, {dtype}: {of}", file=sys.stderr, flush=True)
                    for count, cell in of.items():
                        found[f"{name}, {lowering}, {dtype}, {count} tokens"] = cell
    rows = [row(name, cell) for name, cell in found.items()]
    finish("onnx_gpu", ["", "time", "error", "left to the CPU"], rows, cells=found)


if __name__ == "__main__":
    main()
