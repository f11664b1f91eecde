"""Routed work on the CPU against dense work of the same FLOPs and against the peers."""

# python -m benchmarks.speed.cpu [--quick] [--tokens N...] [--size NAME...] [--routing]: feed-forward
# experts (gated, fp32, 2 threads, warm, all forms side by side, five fresh processes, medians) beside
# one dense feed-forward layer of as many FLOPs a token and transformers' own experts, eager and
# grouped_mm. The routing is the same for all and is made before. Cells that are not asked for keep
# their earlier results.

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from operator import truediv
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import route, sort_plan
from moe_rewrite.utils.text_tables import table

from ..tools import report
from ..tools.fresh_process import answer, in_fresh_process
from ..tools.plots import subplots
from ..tools.timing import Times, side_by_side, timed
from .forms.cpu_experts import WIDTH, Cell

SIZES = {"E8 k2 hidden 1792": (8, 2, 1792), "E64 k8 hidden 512": (64, 8, 512)}
WARM = 1


def one_process(size: str, rows: int, seconds: float, rounds: int) -> dict[str, Times]:
    """Milliseconds of every form, forward and with backward, after a check that they agree."""
    cell = Cell(rows, *SIZES[size])
    cell.check()
    return {what: cell.measure(seconds, rounds, what == "both") for what in ("forward", "both")}


def ffn_cells(
    tokens: Sequence[int], sizes: Sequence[str], seconds: float, rounds: int, processes: int
) -> list[dict[str, Any]]:
    cells = []
    for size in sizes:
        for rows in tokens:
            given = (size, rows, seconds, rounds)
            found = [in_fresh_process(one_process, *given) for _ in range(processes)]
            for what in ("forward", "both"):
                times = [Times(f[what]) for f in found]
                cells.append({"size": size, "tokens": rows, "what": what} | ratios(times))
    return cells


def ratios(times: list[Times]) -> dict[str, Any]:
    """Medians over fresh processes, in each of which the median of the rounds' ratios is taken: the
    addresses of memory, and its reuse, change all times of a process, the dense layer's too."""

    def of(other: str, form: str = "stacked") -> float:
        return median(t.ratio(form, to=other) for t in times)

    return {
        "ms": {form: median(t.medians()[form] for t in times) for form in times[0]},
        "of_dense": of("dense"), "of_eager": of("eager"), "of_grouped_mm": of("grouped_mm"),
        "registered_of_eager": of("eager", "registered"),
        "registered_of_grouped_mm": of("grouped_mm", "registered"),
        "apart_of_dense": of("dense", "apart"), "apart_of_eager": of("eager", "apart"),
        "products_of_dense": of("dense", "products"),
        "of_dense_each": [t.ratio("stacked", to="dense") for t in times],
    }  # fmt: skip


def routing_cells(tokens: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """The share of a forward pass spent in routing, the plan made once or in every layer."""
    cells = []
    for size, (experts, k, hidden) in SIZES.items():
        for rows in tokens:
            cell = Cell(rows, experts, k, hidden)
            router = torch.randn(experts, WIDTH) / WIDTH**0.5

            def plan(cell: Cell = cell, router: torch.Tensor = router, k: int = k) -> Any:
                gates, chosen = route(F.linear(cell.x, router), k)
                return gates, chosen, sort_plan(chosen, len(router))

            for layers in (1, 8, 32):
                once, each = _run_layers(cell, plan, layers, seconds)
                cells.append({
                    "size": size, "tokens": rows, "layers": layers,
                    "once": once, "in_each_layer": each,
                })  # fmt: skip
    return cells


@torch.no_grad()
def _run_layers(
    cell: Cell, plan: Callable[[], Any], layers: int, seconds: float
) -> tuple[float, float]:
    """(share of routing made once, of routing made in each layer), medians of whole passes."""
    routing: dict[str, list[float]] = {"once": [], "in each layer": []}

    def whole(name: str) -> Callable[[], None]:
        plans = 1 if name == "once" else layers

        def run() -> None:
            spent = 0.0
            for layer in range(layers):
                if layer < plans:
                    made, took = timed(plan)
                    spent += 1e3 * took
                ffn_experts(cell.x, *made, *cell.stacks)
            routing[name].append(spent)

        return run

    times = side_by_side({name: whole(name) for name in routing}, 2, warm=WARM, seconds=seconds)
    once, each = (median(map(truediv, routing[n][WARM:], times[n])) for n in routing)
    return once, each


def draw(cells: list[dict[str, Any]]) -> Any:
    figure, axes = subplots(2, 2, (9, 6), sharey=True)
    for row, size in zip(axes, SIZES, strict=True):
        for axis, what in zip(row, ("forward", "both"), strict=True):
            of = [c for c in cells if c["size"] == size and c["what"] == what]
            for form in ("stacked", "apart", "eager", "grouped_mm"):
                shares = [c["ms"][form] / c["ms"]["dense"] for c in of]
                axis.plot([c["tokens"] for c in of], shares, marker="o", label=form)
            axis.axhline(1, color="grey", linewidth=1)
            if of:  # an empty axis has no logarithm
                axis.set(xscale="log", yscale="log")
            axis.set(title=f"{size}, {what}", xlabel="tokens")
            axis.set_ylabel("time / dense layer's")
    axes[0, 0].legend(fontsize=8)
    return figure


def measured(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(feed-forward cells, routing cells): measured if asked for, else from earlier runs."""
    if given.quick:
        return ffn_cells((8,), tuple(SIZES), 0.1, 3, 1), routing_cells((8,), 0.1)
    cells = ffn_cells(given.tokens, given.size, 6.0, 16, 5)
    routing = routing_cells((64, 512), 1.0) if given.routing else []
    old = report.read("cpu_ffn") or {"ffn": [], "routing": []}
    again = {(c["size"], c["tokens"]) for c in cells}
    cells += [c for c in old["ffn"] if (c["size"], c["tokens"]) not in again]
    cells.sort(key=lambda c: (c["size"], c["tokens"], c["what"] != "forward"))
    routing = routing or old["routing"]
    report.save("cpu_ffn", {"ffn": cells, "routing": routing}, draw(cells))
    return cells, routing


def main() -> None:
    torch.set_num_threads(2)
    if answer(one_process):
        return
    parser = report.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 2048])
    parser.add_argument("--size", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--routing", action="store_true", help="measure the share of routing")
    cells, routing = measured(parser.parse_args())
    rows = [
        (c["size"], c["tokens"], c["what"], f"{c['ms']['dense']:.2f} ms", f"{c['of_dense']:.3f}",
         f"{c['of_eager']:.3f}", f"{c['of_grouped_mm']:.3f}", f"{c['apart_of_dense']:.3f}",
         f"{c['apart_of_eager']:.3f}", f"{c['products_of_dense']:.3f}")
        for c in cells
    ]  # fmt: skip
    columns = ["experts", "tokens", "", "dense", "ours/dense", "ours/eager", "ours/grouped_mm",
               "apart/dense", "apart/eager", "products/dense"]  # fmt: skip
    print(table(columns, rows, "cpu: feed-forward experts"))
    shares = [
        (c["size"], c["tokens"], c["layers"], f"{c['once']:.2%}", f"{c['in_each_layer']:.2%}")
        for c in routing
    ]
    columns = ["experts", "tokens", "layers", "routing, once", "routing, in each layer"]
    report.finish("cpu", columns, shares, ffn=cells, routing=routing)


if __name__ == "__main__":
    main()
