"""The cost model's constants on this machine, and the time of its choices relative to the best
form."""

# python -m benchmarks.tune.costs [--quick]: constants from plain measurements; then every form of
# LoRA and feed-forward experts over sizes that the constants were not taken from, forward, medians of
# runs side by side, 2 threads. over best: time of the form that is chosen over the fastest one's.

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from moe_rewrite.kernels import cost_model
from moe_rewrite.kernels.cost_model import CPU, Execution, Machine, best
from moe_rewrite.kernels.ffn.op import ffn_dense, ffn_experts
from moe_rewrite.kernels.lora.grouped import lora_grouped
from moe_rewrite.kernels.lora.op import lora_linear
from moe_rewrite.kernels.plan.op import sort_plan

from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save
from ..tools.timing import alone, side_by_side

WIDTH = 512


def constants(rounds: int) -> Machine:
    def seconds(run: Callable[[], Any], rounds: int = rounds) -> float:
        return alone(run, rounds, warm=1) / 1e3

    wide, rows = torch.randn(1024, 1024), torch.randn(8192, WIDTH)
    index = torch.randperm(len(rows))
    flops = 2 * 1024**3 / seconds(lambda: wide @ wide)
    numbers = 2 * rows.numel() / seconds(lambda: rows.index_select(0, index))
    few, small, place = rows[:64], rows[:8, :8], torch.arange(4)

    def three() -> None:
        few.index_add_(0, place, torch.mm(small[:4], rows[:8]))

    return Machine(flops, numbers, seconds(three, 20 * rounds) / 3)


def chosen(T: int, E: int, k: int) -> torch.Tensor:
    return torch.rand(T, E).argsort(-1)[:, :k].contiguous()


def lora_cell(T: int, E: int, r: int, k: int) -> tuple[dict[Execution, Callable], dict]:
    x, weight = torch.randn(T, WIDTH), torch.randn(WIDTH, WIDTH)
    a, b = torch.randn(E * r, WIDTH), torch.randn(WIDTH, E * r)
    experts = chosen(T, E, k)
    plan, gates = sort_plan(experts, E), torch.rand(T, k)
    scales = torch.zeros(T, E).scatter(1, experts, gates).repeat_interleave(r, 1)
    forms: dict[Execution, Callable] = {
        "dense": lambda: lora_linear(x, weight, None, scales, a, b),
        "grouped": lambda: lora_grouped(x, weight, None, gates, plan, a, b, r),
    }
    base = CPU.product(T, WIDTH, WIDTH)
    expected = cost_model.lora(CPU, T, WIDTH, WIDTH, E, r, k)
    return forms, {form: base + s for form, s in expected.items()}


def ffn_cell(T: int, E: int, H: int, k: int) -> tuple[dict[Execution, Callable], dict]:
    x, experts, gates = torch.randn(T, WIDTH), chosen(T, E, k), torch.rand(T, k)
    up, down, gate = torch.randn(E, H, WIDTH), torch.randn(E, WIDTH, H), torch.randn(E, H, WIDTH)
    plan, every = sort_plan(experts, E), torch.zeros(T, E).scatter(1, experts, gates)
    forms: dict[Execution, Callable] = {
        "dense": lambda: ffn_dense(x, every, up, down, gate),
        "grouped": lambda: ffn_experts(x, gates, experts, plan, up, down, gate),
    }
    return forms, cost_model.ffn(CPU, T, WIDTH, H, E, k, 3)


@torch.no_grad()
def measure(what: str, size: tuple[int, ...], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    forms, expected = (lora_cell if what == "lora" else ffn_cell)(*size)
    found = side_by_side(forms, rounds, warm=1, again_below=math.inf).medians()
    times = {name: ms / 1e3 for name, ms in found.items()}
    choice = best(expected)
    return {
        "what": what, "size": size, "seconds": times, "expected": expected, "chosen": choice,
        "over_best": times[choice] / min(times.values()),
    }  # fmt: skip


def cells(quick: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Other sizes than those that TURN was fitted to (rows 1, 16, 64, 512, 2048; experts 4, 16, 64;
    rank 4, 16; hidden 128, 1024)."""
    rows = (32,) if quick else (1, 32, 256, 1024)
    lora = product(rows, (8, 32), (8, 32), (1, 2))
    ffn = product(rows, (8, 32), (256, 768), (1, 2))
    every = [("lora", s) for s in lora] + [("ffn", s) for s in ffn]
    return every[::5] if quick else every


def draw(found: list[dict[str, Any]]) -> Any:
    figure, axes = subplots(1, 2, (9, 4))
    for axis, what in zip(axes, ("lora", "ffn"), strict=True):
        of = [c for c in found if c["what"] == what]
        for form in ("dense", "grouped"):
            axis.scatter(
                [c["expected"][form] for c in of], [c["seconds"][form] for c in of], s=9, label=form
            )
        ends = [min(c["seconds"]["grouped"] for c in of), max(c["seconds"]["dense"] for c in of)]
        axis.plot(ends, ends, color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", title=what, xlabel="expected s", ylabel="measured s")
    axes[0].legend()
    return figure


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    rounds = 2 if quick else 7
    here = constants(3 * rounds)
    found = [measure(what, size, rounds) for what, size in cells(quick)]
    rows = [
        (c["what"], " ".join(map(str, c["size"])), *(f"{1e3 * s:.3f}" for s in c["seconds"].values()),
         *(f"{1e3 * s:.3f}" for s in c["expected"].values()), c["chosen"], f"{c['over_best']:.2f}")
        for c in found
    ]  # fmt: skip
    over = sorted(c["over_best"] for c in found)
    figures = {
        "constants": vars(here), "used": vars(CPU), "worst_over_best": over[-1],
        "mean_over_best": sum(over) / len(over),
        "best_found": sum(o == 1 for o in over) / len(over),
    }  # fmt: skip
    if not quick:
        save("costs", figures | {"cells": found}, draw(found))
    columns = ["experts", "T E r/H k", "dense, ms", "grouped, ms", "expected", "expected", "chosen",
               "over best"]  # fmt: skip
    finish("costs", columns, rows, **figures)


if __name__ == "__main__":
    main()
