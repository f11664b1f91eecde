"""Exported files in ONNX Runtime on the CPU: feed-forward lowerings, LoRA, generation."""

# python -m benchmarks.speed.onnx [--quick] [--task experts|lora|generate]: 2 threads, fp32, medians
# of rounds side by side. Experts: one layer, top 2 of E, by rows a call. LoRA: a converted 8-layer Llama
# of width 512 with 8 experts of rank 8 on its deep half, against the dense model as
# torch.onnx.export writes it. A full run writes the table that lowering="auto" chooses from.

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import moe_rewrite
from moe_rewrite.onnx.lowerings.choose import LOWERINGS, TABLE
from moe_rewrite.utils.atomic_files import write_json

from ..tools import report
from ..tools.models import llama, llama_with_experts
from ..tools.plots import subplots
from ..tools.timing import side_by_side
from .forms.onnx_files import FORMS, LLAMA, SHAPES, TOP_K, llama_pair, written

ROWS, EXPERTS = (1, 64, 512), (8, 32)
OPENINGS = 3
SHORT = 100.0  # milliseconds


def warm(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each. Short runs are done twice and the second counts, since the other
    files' weights have left the caches cold."""
    return side_by_side(runs, 5, seconds=seconds, again_below=SHORT).medians()


def experts(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Cells of shape, experts, top_k, rows and milliseconds by lowering: medians over sessions that
    are opened anew, since the addresses of the weights can change times by more than a tenth."""
    cells = []
    rows, seconds, openings = ((1, 16), 0.25, 1) if quick else (ROWS, 2.0, OPENINGS)
    shapes = ["plain 384x1536"] if quick else list(SHAPES)
    for shape, count in itertools.product(shapes, (4,) if quick else EXPERTS):
        paths = written(folder, shape, count)
        found: dict[int, list[dict[str, float]]] = {n: [] for n in rows}
        for number in range(openings):
            names = FORMS[number:] + FORMS[:number]  # none is always opened first
            sessions = {name: moe_rewrite.onnx.load(paths[name]).session for name in names}
            for n in rows:
                x = np.random.default_rng(n).standard_normal((1, n, SHAPES[shape][0]))
                feeds = {"x": x.astype(np.float32)}
                runs = {name: partial(s.run, None, feeds) for name, s in sessions.items()}
                found[n].append(warm(runs, seconds))
            del sessions, runs
        for n, times in found.items():
            taken = {name: median(t[name] for t in times) for name in FORMS}
            cells.append({"shape": shape, "experts": count, "top_k": TOP_K, "rows": n, "milliseconds": taken})  # fmt: skip
    return cells


def lora(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    from moe_rewrite.onnx.runtime.session import open_session

    paths = llama_pair(folder, quick)
    sessions = {name: open_session(path) for name, path in paths.items()}
    found = {}
    for tokens in (1, 16) if quick else (1, 128):
        ids = np.random.default_rng(0).integers(1, 1024, (1, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        runs = {n: partial(s.run, None, feeds) for n, s in sessions.items()}
        found[f"{tokens} tokens"] = warm(runs, 0.25 if quick else 7.5)
    return found


def generate(folder: Path, quick: bool) -> dict[str, float]:
    """Tokens a second, greedy, batch 1: the dense and the converted Llama, in ONNX Runtime and in
    PyTorch, the same tokens within each pair."""
    from moe_rewrite.onnx.runtime.generate import Generator

    (layers, width, count), new = LLAMA[quick], 8 if quick else 64
    many, none = (llama_with_experts(layers, width, n) for n in (count, 1))
    none.deactivate(0)
    models = {"dense": none, "converted": many}
    prompt = torch.randint(1, 1024, (1, 16), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for name, moe in models.items():
        target = folder / f"cache-{name}-{width}.onnx"
        if not target.exists():
            moe_rewrite.export_onnx(moe, target, cache=True, verify=False)
        runs[f"{name}, ONNX Runtime"] = partial(Generator(target).generate, prompt, new)
        model = llama(layers, width) if name == "dense" else moe
        runs[f"{name}, PyTorch"] = partial(
            model.generate, prompt, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    for name in models:
        onnx, torch_ = (runs[f"{name}, {where}"]() for where in ("ONNX Runtime", "PyTorch"))
        assert torch.equal(onnx, torch_), f"{name}: other tokens"
    return {n: 1e3 * new / t for n, t in warm(runs, 1.0 if quick else 30.0).items()}


def plot(found: dict[str, Any]) -> Any:
    figure, axes = subplots(1, len(SHAPES), (11, 4), sharey=True)
    names = FORMS[1:]
    for axis, shape in zip(axes, SHAPES, strict=True):
        cells = [c for c in found["experts"] if c["shape"] == shape]
        for i, name in enumerate(names):
            ratios = [c["milliseconds"][name] / min(c["milliseconds"].values()) for c in cells]
            axis.bar([n + 0.2 * i for n in range(len(cells))], ratios, 0.2, label=name)
        labels = [f"E={c['experts']}\n{c['rows']} rows" for c in cells]
        axis.set_xticks([n + 0.3 for n in range(len(cells))], labels, fontsize=7)
        axis.set(title=f"{shape}, top {TOP_K}", yscale="log")
    axes[0].set_ylabel("time over the fastest lowering's")
    axes[0].legend(fontsize=8)
    return figure


def rows_of(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for cell in found.get("experts", []):
        best = min(cell["milliseconds"].values())
        where = f"{cell['shape']}, {cell['experts']} experts, {cell['rows']} rows"
        for name, t in cell["milliseconds"].items():
            rows.append((where, name, f"{t:.2f} ms", f"{t / best:.2f}"))
    for tokens, times in found.get("lora", {}).items():
        base = times["dense"]
        rows += [(f"LoRA, {tokens}", n, f"{t:.2f} ms", f"{t / base:.2f}") for n, t in times.items()]
    speeds = found.get("generate", {})
    for name, speed in speeds.items():
        base = speeds["dense, " + name.split(", ")[1]]
        rows.append(("greedy, batch 1", name, f"{speed:.1f} tokens/s", f"{speed / base:.2f}"))
    return rows


def _to_choose_from(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | {"milliseconds": {n: cell["milliseconds"][n] for n in LOWERINGS[1:]}}


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Results by task: measured now if asked for, else as saved in the folder."""
    found: dict[str, Any] = {}
    for task in (experts, lora, generate):
        name = task.__name__
        kept = folder / f"{name}.json"
        if given.task in (None, name):
            found[name] = task(folder, given.quick)
            if given.folder and not given.quick:
                write_json(kept, found[name])
        elif kept.exists():
            found[name] = json.loads(kept.read_text())
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--task", choices=["experts", "lora", "generate"], help="only this one")
    parser.add_argument(
        "--folder", type=Path, help="keep exported files, and results by task, here"
    )
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        found = measured(given, folder)
    if not given.quick and len(found) == 3:
        report.save("onnx", found, plot(found))
    if not given.quick and "experts" in found:
        cells = [_to_choose_from(c) for c in found["experts"]]
        write_json(TABLE, report.machine() | {"cells": cells})
    report.finish("onnx", ["", "what", "time", "ratio"], rows_of(found), **found)


if __name__ == "__main__":
    main()
