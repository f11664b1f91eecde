"""Exported files in ONNX Runtime on the CPU: lowerings of feed-forward experts, LoRA, generation.

``python -m benchmarks.onnx [--quick] [--task experts|lora|generate]``: 2 threads, fp32, medians of
runs that take turns. Experts: one layer, top 2 of E, by rows a call. LoRA: a converted 8-layer Llama
of width 512 with 8 experts of rank 8 on its deep half, against the dense model as
torch.onnx.export writes it. A full run writes the table that ``lowering="auto"`` chooses from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter
from moe_rewrite.onnx.lowerings.choose import LOWERINGS, TABLE
from moe_rewrite.utils.atomic_files import write_json

from .common import finish, machine, save

ROWS, EXPERTS, TOP_K = (1, 64, 512), (8, 32), 2
OPENINGS = 3
SHORT = 100.0  # milliseconds
FORMS = (*LOWERINGS, "open")  # "auto" among them, as the table of the run before has it
SHAPES = {"gated 512x1024": (512, 1024, True), "plain 384x1536": (384, 1536, False)}


class Layer(nn.Module):
    """A product that the router reads, and a feed-forward behind it."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.first, self.gated = nn.Linear(width, width), gated
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, hidden, bias=not gated)})
        if gated:
            self.mlp["gate"] = nn.Linear(width, hidden, bias=False)
        self.mlp["down"] = nn.Linear(hidden, width, bias=not gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        up = self.mlp["up"](x)
        if self.gated:
            hidden = F.silu(self.mlp["gate"](x)) * up
        else:
            hidden = F.gelu(up, approximate="tanh")
        return x + self.mlp["down"](hidden)


def layer(shape: str, experts: int) -> MoEModel:
    torch.manual_seed(0)
    model = Layer(*SHAPES[shape]).eval()
    router = TokenRouter(top_k=TOP_K, base=False, init=1.0)
    x = torch.randn(2, 3, SHAPES[shape][0])
    moe = moe_rewrite.convert(
        model, mode="upcycle", split=1, router=router, num_experts=experts,
        example_inputs=x, verify=False,
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def session(path: Path) -> Any:
    return moe_rewrite.onnx.load(path).session


def turns(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds of each, the median over rounds in which all take turns; two rounds to warm. A
    short run comes twice and counts once: the other files' weights have left the caches cold."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(300):
        for name, run in list(runs.items())[:: 1 if number % 2 else -1]:
            if spent[name] and spent[name][-1] < SHORT:
                run()
            before = time.perf_counter()
            run()
            spent[name].append(1e3 * (time.perf_counter() - before))
        if number > 5 and time.perf_counter() - start > seconds:
            break
    return {name: median(values[2:]) for name, values in spent.items()}


def experts(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Cells of shape, experts, top_k, rows and milliseconds by lowering: medians over sessions that
    are opened anew, since where the weights come to lie can cost more than a tenth."""
    cells = []
    rows, seconds, openings = ((1, 16), 0.5, 1) if quick else (ROWS, 4.0, OPENINGS)
    shapes = ["plain 384x1536"] if quick else list(SHAPES)
    for shape, count in itertools.product(shapes, (4,) if quick else EXPERTS):
        paths = written(folder, shape, count)
        found: dict[int, list[dict[str, float]]] = {n: [] for n in rows}
        for number in range(openings):
            names = FORMS[number:] + FORMS[:number]  # none always comes to lie first
            sessions = {name: session(paths[name]) for name in names}
            for n in rows:
                x = np.random.default_rng(n).standard_normal((1, n, SHAPES[shape][0]))
                feeds = {"x": x.astype(np.float32)}
                runs = {name: partial(s.run, None, feeds) for name, s in sessions.items()}
                found[n].append(turns(runs, seconds))
            del sessions, runs
        for n, times in found.items():
            taken = {name: median(t[name] for t in times) for name in FORMS}
            cells.append({"shape": shape, "experts": count, "top_k": TOP_K, "rows": n, "milliseconds": taken})  # fmt: skip
    return cells


def written(folder: Path, shape: str, count: int) -> dict[str, Path]:
    """The file of each form; what lies in the folder is taken as it is."""
    width = SHAPES[shape][0]
    paths = {name: folder / f"{name}-{count}-{width}.onnx" for name in FORMS}
    moe = layer(shape, count)
    for name, path in paths.items():
        if not path.exists():
            asked: Any = {"open_experts": True} if name == "open" else {"lowering": name}
            x = torch.randn(2, 3, width)
            report = moe_rewrite.export_onnx(moe, path, verify=False, example_inputs=x, **asked)
            assert name == "auto" or report.lowering.startswith(name)
    return paths


def llama_pair(folder: Path, quick: bool) -> tuple[Path, Path]:
    """The dense model as torch.onnx.export writes it, and the converted one."""
    from .cpu_lora import ours
    from .features import llama

    layers, width, count = (2, 64, 3) if quick else (8, 512, 8)
    dense, converted = folder / f"dense-{width}.onnx", folder / f"lora-{width}.onnx"
    if not dense.exists():
        write_dense(llama(layers, width), dense)
    if not converted.exists():
        moe_rewrite.export_onnx(ours(layers, width, count), converted, verify=False)
    return dense, converted


def write_dense(model: nn.Module, path: Path) -> None:
    """As torch.onnx.export does by itself, batch and length open."""
    ids = torch.ones(2, 9, dtype=torch.long)
    auto = torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    torch.onnx.export(
        model, (), path, dynamo=True, verbose=False, external_data=False,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
    )  # fmt: skip


def lora(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    from moe_rewrite.onnx.runtime.session import open_session

    paths = dict(zip(("dense", "converted"), llama_pair(folder, quick), strict=True))
    sessions = {name: open_session(path) for name, path in paths.items()}
    found = {}
    for tokens in (1, 16) if quick else (1, 128):
        ids = np.random.default_rng(0).integers(1, 1024, (1, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        runs = {n: partial(s.run, None, feeds) for n, s in sessions.items()}
        found[f"{tokens} tokens"] = turns(runs, 0.5 if quick else 15.0)
    return found


def generate(folder: Path, quick: bool) -> dict[str, float]:
    """Tokens a second, greedy, batch 1: the dense and the converted Llama, in ONNX Runtime and in
    PyTorch, the same tokens within each pair."""
    from moe_rewrite.onnx.runtime.generate import Generator

    from .cpu_lora import ours
    from .features import llama

    layers, width, count, new = (2, 64, 3, 8) if quick else (8, 512, 8, 64)
    many, none = ours(layers, width, count), ours(layers, width, 1)
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
    return {n: 1e3 * new / t for n, t in turns(runs, 1.0 if quick else 30.0).items()}


def plot(found: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(11, 4), sharey=True)
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
    figure.tight_layout()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer repeats")
    parser.add_argument("--task", choices=["experts", "lora", "generate"], help="only this one")
    parser.add_argument(
        "--folder", type=Path, help="keep exported files, and results by task, here"
    )
    given = parser.parse_args()
    torch.set_num_threads(2)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for task in (experts, lora, generate):
            name = task.__name__
            kept = folder / f"{name}.json"
            if given.task not in (None, name):
                if kept.exists():
                    found[name] = json.loads(kept.read_text())
                continue
            found[name] = task(folder, given.quick)
            if given.folder and not given.quick:
                write_json(kept, found[name])
    if not given.quick and len(found) == 3:
        save("onnx", found, plot(found))
    if not given.quick and "experts" in found:
        write_json(TABLE, machine() | {"cells": [_to_choose_from(c) for c in found["experts"]]})
    finish("onnx", ["", "what", "time", "ratio"], rows_of(found), **found)


if __name__ == "__main__":
    main()
