"""A region run by experts on patches against the dense region and its masked-dense form."""

# python -m benchmarks.speed.regions [--quick]: two 3x3 convolutions of 64 channels with batch norm,
# grid 8, batch 32, 2 threads, warm medians. The plan serves every deep layer, so the region is timed
# with a plan made before, and with the router too. Then: from which map size on routing pays, what a
# halo costs by patch size, and memory.

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.memory import peak_of
from ..tools.models import with_backward
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save
from ..tools.timing import side_by_side

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


def warm(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each form: each runs twice in its turn and the second run counts, so
    that no form pays for the caches that another one left."""
    return side_by_side(forms, rounds, again_below=math.inf).medians()


def compare(size: int, shares: list[int], rounds: int) -> list[dict[str, Any]]:
    """Dense, masked and routed by the share of the patches that the expert takes."""
    torch.manual_seed(0)
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, size, size)
    return [compare_share(model, x, share, rounds) for share in shares]


def compare_share(model: Region, x: torch.Tensor, share: int, rounds: int) -> dict[str, Any]:
    moe = routed(model, x.shape[2], GRID**2 // share)
    with torch.no_grad():
        plan = moe.route(x)

    def planned() -> torch.Tensor:
        with moe.use_plan(plan):
            return moe(x)

    dense, whole = partial(model, x), partial(moe, x)
    with torch.no_grad():
        once = warm(
            {"dense": dense, "masked": partial(masked, model, moe, x), "routed": planned,
             "with_router": whole},
            rounds,
        )  # fmt: skip
    # to the weights and, as for the dense region, not to the input
    gradient, trained = torch.randn_like(x), moe.trainable_parameters()
    experts = [p for p in trained if p is not moe.router.rows[0]]
    both = warm(
        {"dense": with_backward(dense, gradient, model.parameters()),
         "routed": with_backward(planned, gradient, experts),
         "with_router": with_backward(whole, gradient, trained)},
        rounds,
    )  # fmt: skip
    return {
        "size": x.shape[2], "share": f"1/{share}", "dense_ms": once["dense"],
        "masked": once["masked"] / once["dense"], "forward": once["routed"] / once["dense"],
        "forward_with_router": once["with_router"] / once["dense"],
        "dense_both_ms": both["dense"], "both": both["routed"] / both["dense"],
        "both_with_router": both["with_router"] / both["dense"],
    }  # fmt: skip


def over_processes(size: int, rounds: int, processes: int) -> list[dict[str, Any]]:
    """Medians over fresh processes: how memory was laid out in one moves its ratios by a third."""
    runs = [in_fresh_process(compare, size, [1, 4, 16], rounds) for _ in range(processes)]
    rows: list[dict[str, Any]] = []
    for same in zip(*runs, strict=True):
        row = {
            k: v if isinstance(v, (str, int)) else median(r[k] for r in same)
            for k, v in same[0].items()
        }
        row["forward_range"] = [min(r["forward"] for r in same), max(r["forward"] for r in same)]
        rows.append(row)
    return rows


def halo_costs(size: int, rounds: int) -> list[dict[str, Any]]:
    """All patches by one expert: what the halo adds, by patch size; the break-even share."""
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, size, size)
    results = []
    for grid in (16, 8, 4, 2):
        moe = routed(model, size, grid**2 // 4, halo=True, grid=grid)
        with torch.no_grad():
            times = warm({"dense": partial(model, x), "routed": partial(moe, x)}, rounds)
        macs = moe.report.macs
        assert macs is not None
        results.append({
            "patch": size // grid, "macs_of_all": 4 * macs.experts / macs.dense,
            "quarter": times["routed"] / times["dense"],
        })  # fmt: skip
    return results


def memory(share: int) -> float:
    """Peak memory above the start of one forward and backward pass, in MB."""
    model = Region(WIDTH).eval()
    x = torch.randn(BATCH, WIDTH, 64, 64)
    run = routed(model, 64, GRID**2 // share) if share else model
    run(x[:2]).sum().backward()
    return peak_of(lambda: run(x).sum().backward())[1]


def draw(figures: dict[str, Any]) -> Any:
    figure, axis = subplots(1, 1, (6, 4))
    for share in ("1/4", "1/16"):
        rows = [r for r in figures["maps"] if r["share"] == share]
        sizes = [r["size"] for r in rows]
        label = f"routed, {share} of the patches"
        axis.plot(sizes, [r["forward"] for r in rows], marker="o", label=label)
    axis.plot(sizes, [r["masked"] for r in rows], marker="s", label="masked dense")
    axis.axhline(1, color="grey", linewidth=1)
    axis.set(xlabel="side of the map", ylabel="time / dense region's time")
    axis.set_title("Forward, grid 8, batch 32")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0)
    axis.legend()
    return figure


def main() -> None:
    torch.set_num_threads(2)
    if answer(compare, memory):
        return
    quick = is_quick(__doc__)
    rounds = 3 if quick else 7
    processes = {32: 1} if quick else {8: 1, 16: 1, 32: 9, 64: 1}
    maps = [row for size, n in processes.items() for row in over_processes(size, rounds, n)]
    halo = halo_costs(32, rounds)
    peaks = {
        name: in_fresh_process(memory, share)
        for name, share in {"dense": 0, "1/4": 4, "1/16": 16}.items()
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
