"""Routed work on a GPU against dense work and other libraries' experts."""

# python -m benchmarks.speed.gpu [--quick]: bf16, medians of warm calls, all forms side by side.
# TFLOP/s count the products alone; the share is of the rate of one dense product, which has its turn
# in every round too: a chip that is hot does less, for all of them. Beside ours: transformers'
# grouped_mm, a plain pipeline over F.grouped_mm, and ScatterMoE's and Liger's kernels where they are
# installed (Liger tunes itself at every shape, but not with LIGER_FUSED_MOE_AUTOTUNE=0). Without a GPU
# the kernels run in Triton's interpreter, in fp32 at tiny sizes: that shows that the script runs to its
# end, its times say nothing.

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import torch

from ..tools.device import Place, device_name, there
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save
from .forms.gpu_experts import Dense, Experts, Shape

GOALS = {  # share of the dense product's rate: forward, backward
    Shape(32768, 4096, 2048, 64, 4): (0.65, 0.55), Shape(32768, 4096, 256, 256, 16): (0.50, 0.42),
    Shape(512, 4096, 2048, 64, 4): None, Shape(32768, 4096, 14336, 8, 2): None,
}  # fmt: skip
TINY = {Shape(24, 16, 8, 4, 2): None}


def expert_cells(shapes: dict[Shape, Any], place: Place) -> list[dict[str, Any]]:
    cells, dense = [], Dense(place)
    for shape, goal in shapes.items():
        found = Experts(shape, place).measure(dense)
        print(f"{shape}: {found}", file=sys.stderr, flush=True)
        whole = {n: dense.tflops(found["dense"][n]) for n in ("forward", "both")}
        for form, ms in found.items():
            if form == "dense":
                continue
            rates = {
                "forward": shape.flops() / ms["forward"] / 1e9,
                "backward": 2 * shape.flops() / max(ms["both"] - ms["forward"], 1e-9) / 1e9,
            }
            shares = {
                "forward": rates["forward"] / whole["forward"],
                "backward": rates["backward"] / whole["both"],
            }
            cells.append({
                "shape": str(shape), "form": form, "ms": ms, "tflops": rates, "goal": goal,
                "share": shares, "dense_tflops": whole,
            })  # fmt: skip
    return cells


def draw(cells: list[dict[str, Any]]) -> Any:
    shapes = list(dict.fromkeys(c["shape"] for c in cells))
    figure, axes = subplots(1, len(shapes), (4 * len(shapes), 4), sharey=True)
    for axis, shape in zip(axes, shapes, strict=True):
        own = [c for c in cells if c["shape"] == shape]
        for i, what in enumerate(("forward", "backward")):
            places = [n + 0.4 * i for n in range(len(own))]
            axis.bar(places, [c["share"][what] for c in own], width=0.4, label=what)
        axis.set_xticks(range(len(own)), [c["form"] for c in own], rotation=30, fontsize=8)
        axis.set_title(shape, fontsize=9)
    axes[0].set_ylabel("share of a dense product's rate")
    axes[0].legend()
    return figure


def main() -> None:
    quick = is_quick(__doc__)
    gpu, place = torch.cuda.is_available(), there(5 if quick else 20)
    shapes = TINY if not gpu else dict(list(GOALS.items())[: 1 if quick else None])
    cells = expert_cells(shapes, place)
    figures = {"device": device_name(), "triton": version("triton"), "ffn": cells}
    figures["liger_autotuned"] = os.environ.get("LIGER_FUSED_MOE_AUTOTUNE", "1") == "1"
    if gpu and not quick:
        save("gpu", figures, draw(cells))
    rows = [
        (c["shape"], c["form"], *(f"{c['ms'][w]:.2f}" for w in ("forward", "both")),
         *(f"{c['tflops'][w]:.3g}" for w in ("forward", "backward")),
         *(f"{c['dense_tflops'][w]:.3g}" for w in ("forward", "both")),
         *(f"{c['share'][w]:.1%}" for w in ("forward", "backward")),
         "" if c["goal"] is None else "{:.0%}, {:.0%}".format(*c["goal"]))
        for c in cells
    ]  # fmt: skip
    columns = ["experts", "form", "forward ms", "both ms", "TFLOP/s", "backward", "dense TFLOP/s",
               "both", "of dense", "backward", "goals"]  # fmt: skip
    finish("gpu", columns, rows, **figures)


if __name__ == "__main__":
    main()
