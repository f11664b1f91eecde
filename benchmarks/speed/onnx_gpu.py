"""Exported files on a GPU: ONNX Runtime's CUDA provider against PyTorch."""

# python -m benchmarks.speed.onnx_gpu [--quick] [--provider cpu], with pip install
# 'moe-rewrite[gpu]' instead of the package onnxruntime. A converted Llama, LoRA experts and upcycled,
# in fp16 and bf16: nodes left to the CPU, largest difference from PyTorch in fp32, milliseconds a call,
# the median of calls side by side with the dense model, in fp16 as torch.onnx.export writes it.
# --provider cpu runs the same in fp32 where there is no GPU.

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import moe_rewrite
from moe_rewrite import FFNExperts, MoEModel
from moe_rewrite.onnx.runtime.session import open_session

from ..tools import report
from ..tools.models import llama
from .forms.onnx_files import by_pytorch
from .onnx import warm

SIZES = ((8, 1024), (2, 64))  # layers and width; the latter of a quick run
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def dense(quick: bool, provider: str, folder: Path) -> Any:
    """A session on the dense model."""
    model, path = llama(*SIZES[quick]), folder / "dense.onnx"
    by_pytorch(model.half() if provider == "cuda" else model, path)
    return open_session(path, providers=[PROVIDERS[provider]])


def models(quick: bool) -> dict[str, MoEModel]:
    layers, width = SIZES[quick]
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
    moe: MoEModel,
    dtype: str,
    lowering: str,
    provider: str,
    folder: Path,
    tokens: tuple[int, ...],
    base: Any,
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
        feeds = {name: t.numpy() for name, t in given.items()}
        runs = {"dense": base, "converted": loaded.session}
        times = warm({n: partial(s.run, None, feeds) for n, s in runs.items()}, 2.0)
        error = float((got - want).abs().max() / want.abs().max())
        found[count] = {"cpu_only": report.cpu_only, "error": error, "milliseconds": times}
    return found


def row(name: str, cell: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in cell:
        return name, "refused", "", cell["refused"], ""
    left, ms = ", ".join(cell["cpu_only"]) or "none", cell["milliseconds"]
    ratio = f"{ms['converted'] / ms['dense']:.2f}"
    return name, f"{ms['converted']:.2f} ms", ratio, f"{cell['error']:.1e}", left


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cuda")
    given = parser.parse_args()
    dtypes = ("float16", "bfloat16") if given.provider == "cuda" else ("float32",)
    tokens = (1, 16) if given.quick else (1, 512)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = dense(given.quick, given.provider, Path(folder))
        for name, moe in models(given.quick).items():
            for lowering in ("auto", "contrib") if name == "upcycled" else ("auto",):
                for dtype in dtypes:
                    of = measured(moe, dtype, lowering, given.provider, Path(folder), tokens, base)
                    print(f"{name}, {lowering}, {dtype}: {of}", file=sys.stderr, flush=True)
                    for count, cell in of.items():
                        found[f"{name}, {lowering}, {dtype}, {count} tokens"] = cell
    figures = {"onnxruntime": onnxruntime.__version__, "cells": found}
    if given.provider == "cuda" and not given.quick:
        report.save("onnx_gpu", {"device": torch.cuda.get_device_name()} | figures)
    rows = [row(name, cell) for name, cell in found.items()]
    report.finish("onnx_gpu", ["", "time", "of dense", "error", "left to the CPU"], rows, **figures)


if __name__ == "__main__":
    main()
