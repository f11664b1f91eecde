"""A region run by experts on patches against the dense region and its masked-dense form.

``python -m benchmarks.regions [--quick]``: two 3x3 convolutions of 64 channels with batch norm,
grid 8, batch 32, 2 threads, warm medians. The plan serves
every deep layer, so the region is timed with a plan at hand, and with the router too. Then: from which map size on routing pays, what a halo costs by
patch size, and memory.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb, save

GRID, BATCH, WIDTH = 8, 32, 64


class Region(nn.Module):
    """The region alone: the router reads the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.region = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.region(x)


def routed(
    model: nn.Module, size: int, taken: int, halo: bool = False, grid: int = GRID
) -> MoEModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        moe = moe_rewrite.convert(
            model, split=0, router=PatchRouter(grid, taken, init=1.0),
            experts=RegionExperts("region", halo=halo), verify=False,
            example_inputs=torch.zeros(2, WIDTH, size, size),
        )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def masked(model: Region, moe: MoEModel, x: torch.Tensor) -> torch.Tensor:
    """The official code's form: the dense region on everything, masked by the gates."""
    plan = moe.route(x)
    g = plan.grid
    gates = plan.weights.view(len(x), 1, g, g)
    return model(x) * F.interpolate(gates, scale_factor=x.shape[2] // g)


def rounds(forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each form, warm: in every round each runs twice, in turn, and the
    second run counts, so that no form pays for the caches that another one left."""
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 2):
        for name, run in forms.items():
            run()
            start = time.perf_counter()
            run()
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(times[2:]) for name, times in spent.items()}


def forward(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], Any]:
    def go() -> Any:
        with torch.no_grad():
            return run(x)

    return go


def both(run: Callable, x: torch.Tensor, parameters: list[Any]) -> Callable[[], Any]:
    """Forward and backward, to the weights and, as for the dense region, not to the input."""
    gradient = torch.randn_like(x)

    def go() -> None:
        for p in parameters:
            p.grad = None
        run(x).backward(gradient)

    return go


def compare(size: int, shares: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, size, size)
    results = []
    weights = list(model.parameters())
    for share in shares:
        moe = routed(model, size, GRID**2 // share)
        with torch.no_grad():
            plan = moe.route(x)

        def planned(x: torch.Tensor, moe: Any = moe, plan: Any = plan) -> torch.Tensor:
            with moe.use_plan(plan):
                return moe(x)

        once = {
            "dense": forward(model, x), "masked": forward(lambda x, m=moe: masked(model, m, x), x),
            "routed": forward(planned, x), "with_router": forward(moe, x),
        }  # fmt: skip
        trained = moe.trainable_parameters()
        twice = {
            "dense": both(model, x, weights), "with_router": both(moe, x, trained),
            "routed": both(planned, x, [p for p in trained if p is not moe.router.rows[0]]),
        }  # fmt: skip
        a, b = rounds(once, repeats), rounds(twice, repeats)
        results.append({
            "size": size, "share": f"1/{share}", "dense_ms": a["dense"],
            "masked": a["masked"] / a["dense"], "forward": a["routed"] / a["dense"],
            "forward_with_router": a["with_router"] / a["dense"],
            "dense_both_ms": b["dense"], "both": b["routed"] / b["dense"],
            "both_with_router": b["with_router"] / b["dense"],
        })  # fmt: skip
    return results


def over_processes(size: int, repeats: int, processes: int) -> list[dict[str, Any]]:
    """Medians over fresh processes: how memory was laid out in one moves its ratios by a third."""
    given = json.dumps([size, [1, 4, 16], repeats])
    runs = [in_fresh_process("benchmarks.regions", "maps", given) for _ in range(processes)]
    rows: list[dict[str, Any]] = []
    for same in zip(*runs, strict=True):
        row = {
            k: v if isinstance(v, (str, int)) else median(r[k] for r in same)
            for k, v in same[0].items()
        }
        row["forward_range"] = [min(r["forward"] for r in same), max(r["forward"] for r in same)]
        rows.append(row)
    return rows


def halo_costs(size: int, repeats: int) -> list[dict[str, Any]]:
    """All patches by one expert: what the halo adds, by patch size; the break-even share."""
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, size, size)
    results = []
    for grid in (16, 8, 4, 2):
        moe = routed(model, size, grid**2 // 4, halo=True, grid=grid)
        times = rounds({"dense": forward(model, x), "routed": forward(moe, x)}, repeats)
        macs = moe.report.macs
        assert macs is not None
        results.append({
            "patch": size // grid, "macs_of_all": 4 * macs.experts / macs.dense,
            "quarter": times["routed"] / times["dense"],
        })  # fmt: skip
    return results


def memory(share: int) -> float:
    """Peak memory above the start of one forward and backward pass, in MB."""
    torch.set_num_threads(2)
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, 64, 64)
    run = routed(model, 64, GRID**2 // share) if share else model
    run(x[:2]).sum().backward()
    forget_peak()
    before = memory_mb("VmRSS")
    run(x).sum().backward()
    return memory_mb("VmHWM") - before


def _maps(given: list[Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    return compare(*given)


TASKS: dict[str, Callable[[Any], Any]] = {"memory": memory, "maps": _maps}


def draw(figures: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for share in ("1/4", "1/16"):
        rows = [r for r in figures["maps"] if r["share"] == share]
        sizes = [r["size"] for r in rows]
        axis.plot(
            sizes, [r["forward"] for r in rows], marker="o", label=f"routed, {share} of the patches"
        )
    axis.plot(sizes, [r["masked"] for r in rows], marker="s", label="masked dense")
    axis.axhline(1, color="grey", linewidth=1)
    axis.set(
        xlabel="side of the map",
        ylabel="time / dense region's time",
        title="Forward, grid 8, batch 32",
    )
    axis.set_xscale("log", base=2)
    axis.set_ylim(0)
    axis.legend()
    figure.tight_layout()
    return figure


def main() -> None:
    if "--task" in sys.argv:  # one measurement in a process of its own
        run, given = sys.argv[sys.argv.index("--task") + 1 :]
        print(json.dumps(TASKS[run](json.loads(given))))
        return
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(2)
    repeats = 3 if quick else 7
    processes = {32: 1} if quick else {8: 1, 16: 1, 32: 9, 64: 1}
    maps = [row for size, n in processes.items() for row in over_processes(size, repeats, n)]
    halo = halo_costs(32, repeats)
    peaks = {
        name: in_fresh_process("benchmarks.regions", "memory", share)
        for name, share in {"dense": "0", "1/4": "4", "1/16": "16"}.items()
    }
    figures = {"maps": maps, "halo": halo, "memory_mb": peaks}
    if not quick:
        save("regions", figures, draw(figures))
    rows = [
        (r["size"], r["share"], f"{r['dense_ms']:.1f} ms", f"{r['masked']:.2f}",
         f"{r['forward']:.3f} ({r['forward_with_router']:.3f})",
         f"{r['both']:.3f} ({r['both_with_router']:.3f})")
        for r in maps
    ]  # fmt: skip
    rows += [
        (f"halo, patch {h['patch']}", "1/4", "", "", f"{h['quarter']:.3f}",
         f"(MACs of all patches: {h['macs_of_all']:.2f})")
        for h in halo
    ]  # fmt: skip
    rows += [(f"memory at 64, {n}", "", f"{b:.0f} MB", "", "", "") for n, b in peaks.items()]
    columns = ["map", "patches", "dense", "masked", "routed (with router)", "and backward"]
    finish("regions", columns, rows, **figures)


if __name__ == "__main__":
    main()
