"""Routed work on the CPU against dense work of the same FLOPs and against the peers.

``python -m benchmarks.cpu [--quick] [--tokens N...] [--size NAME...] [--routing]``: feed-forward
experts (gated, fp32, 2 threads, warm, all forms in every round in an order of its own, five fresh processes, medians)
beside one dense feed-forward layer of as many FLOPs a token and transformers' own experts, eager and
grouped_mm. The routing is the same for all and is made before. Cells that are not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import route, sort_plan
from moe_rewrite.utils.text_tables import table

from .common import finish, in_fresh_process, save

Forms = dict[str, Callable[[], torch.Tensor]]
SIZES = {"E8 k2 hidden 1792": (8, 2, 1792), "E64 k8 hidden 512": (64, 8, 512)}
WIDTH = 512
CACHE = 64 << 20  # bytes read before each call, as other layers' weights are in a model


class Cell:
    """One size at one number of rows: the forms, each a call without arguments, and what their
    backward passes reach."""

    def __init__(self, rows: int, experts: int, k: int, hidden: int) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, WIDTH, requires_grad=True)
        self.gates, self.experts = route(torch.randn(rows, experts), k)
        self.gates.requires_grad_()
        self.plan = sort_plan(self.experts, experts)

        def weight(*size: int) -> torch.Tensor:
            return (torch.randn(size) / size[-1] ** 0.5).requires_grad_()

        wide = k * hidden
        self.dense = [weight(wide, WIDTH), weight(WIDTH, wide), weight(wide, WIDTH)]
        self.stacks = [
            weight(experts, hidden, WIDTH), weight(experts, WIDTH, hidden),
            weight(experts, hidden, WIDTH),
        ]  # fmt: skip
        self.apart = [[w.detach().clone().requires_grad_() for w in s] for s in self.stacks]
        self.peer = self._peer(experts, k, hidden)
        self.leaves = [self.x, self.gates, *self.dense, *self.stacks, *self.peer.parameters()]
        self.leaves += [w for kind in self.apart for w in kind]
        self.direction = torch.randn(rows, WIDTH)
        self.others = torch.ones(CACHE // 4)

    def _peer(self, experts: int, k: int, hidden: int) -> torch.nn.Module:
        """transformers' experts with the same weights."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=WIDTH, moe_intermediate_size=hidden, num_experts=experts,
            num_experts_per_tok=k, hidden_act="silu",
        )  # fmt: skip
        peer = Qwen3MoeExperts(config)
        up, down, gate = (w.detach() for w in self.stacks)
        peer.load_state_dict({"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down.clone()})
        return peer

    def forms(self) -> Forms:
        def dense() -> torch.Tensor:
            up, down, gate = self.dense
            return F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down)

        def ours(weights: Any) -> Callable[[], torch.Tensor]:
            return lambda: ffn_experts(self.x, self.gates, self.experts, self.plan, *weights)

        def peer(form: str) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                self.peer.config._experts_implementation = form
                return self.peer(self.x, self.experts, self.gates)

            return run

        return {
            "dense": dense, "stacked": ours(self.stacks), "apart": ours(self.apart),
            "eager": peer("eager"), "grouped_mm": peer("grouped_mm"),
        }  # fmt: skip

    def products(self, backward: bool) -> Callable[[], None]:
        """Nothing but the experts' products, of rows that lie as they are wanted, into memory that
        is at hand: what no form can be faster than."""
        up, down, gate = (w.detach() for w in self.stacks)
        grads = [torch.empty_like(w) for w in (up, down, gate)]
        ends = self.plan.offsets.tolist()
        sizes = [hi - lo for lo, hi in pairwise(ends)]
        rows, hidden = torch.randn(2, max(sizes), WIDTH), torch.randn(3, max(sizes), up.shape[1])

        def run() -> None:
            for e, n in enumerate(sizes):
                (x, y), (a, b, c) = rows[:, :n], hidden[:, :n]
                torch.mm(x, up[e].t(), out=a)
                torch.mm(x, gate[e].t(), out=b)
                torch.mm(c, down[e].t(), out=y)
            for e, n in enumerate(sizes if backward else ()):
                (x, y), (a, b, c) = rows[:, :n], hidden[:, :n]
                torch.mm(x, down[e], out=c)
                torch.mm(x.t(), a, out=grads[1][e])
                torch.mm(a.t(), x, out=grads[0][e])
                torch.mm(b.t(), x, out=grads[2][e])
                torch.mm(a, up[e], out=y).addmm_(b, gate[e])

        return run

    def check(self) -> None:
        """All routed forms agree."""
        with torch.no_grad():
            found = {name: run() for name, run in self.forms().items() if name != "dense"}
        for name, y in found.items():
            torch.testing.assert_close(y, found["stacked"], msg=name, rtol=1e-3, atol=1e-4)

    def measure(self, seconds: float, rounds: int, backward: bool) -> dict[str, list[float]]:
        """Milliseconds of each form in every round but the first; none finds its weights in the
        cache. A form that takes over half of the seconds in two calls is no rival of the others and
        drops out; these go for as many seconds, and for at least so many rounds, in each in another
        order: what a form comes behind shows in calls of a few milliseconds."""
        draw = random.Random(0)
        forms: dict[str, Callable[[], Any]] = {**self.forms(), "products": self.products(backward)}
        spent: dict[str, list[float]] = {name: [] for name in forms}
        while len(spent["dense"]) <= rounds or sum(spent["dense"]) * len(forms) < 1e3 * seconds:
            for name in draw.sample(list(forms), len(forms)):
                spent[name].append(self._timed(forms[name], backward and name != "products"))
                slow = len(spent[name]) == 2 and sum(spent[name]) > 500 * seconds
                if slow and name != "dense":  # which counts the rounds
                    del forms[name]
        return {name: times[1:] for name, times in spent.items()}

    def _timed(self, run: Callable[[], Any], backward: bool) -> float:
        """Milliseconds of one call."""
        for leaf in self.leaves:
            leaf.grad = None
        self.others.sum()
        start = time.perf_counter()
        if backward:
            run().backward(self.direction)
        else:
            with torch.no_grad():
                run()
        return 1e3 * (time.perf_counter() - start)


def one_process(
    size: str, rows: int, seconds: float, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every form, forward and with backward, once they are seen to agree."""
    cell = Cell(rows, *SIZES[size])
    cell.check()
    return {what: cell.measure(seconds, rounds, what == "both") for what in ("forward", "both")}


def ffn_cells(
    tokens: Sequence[int], sizes: Sequence[str], seconds: float, rounds: int, processes: int
) -> list[dict[str, Any]]:
    """Medians of fresh processes: where memory comes to lie, and whether it is had again, moves a
    whole process, the dense layer's too. In each the median of the rounds' ratios: a machine that
    others use as well is fast and slow by turns of seconds."""
    cells = []
    for size in sizes:
        for rows in tokens:
            given = ("benchmarks.cpu", "cell", size, str(rows), str(seconds), str(rounds))
            found = [in_fresh_process(*given) for _ in range(processes)]
            for what in ("forward", "both"):
                times = [f[what] for f in found]

                def each(other: str, form: str = "stacked", times: Any = times) -> list[float]:
                    return [median(map(truediv, t[form], t[other])) for t in times]

                def of(*forms: str, each: Any = each) -> float:
                    return median(each(*forms))

                cells.append({
                    "size": size, "tokens": rows, "what": what,
                    "ms": {form: median(median(t[form]) for t in times) for form in times[0]},
                    "of_dense": of("dense"), "of_eager": of("eager"),
                    "of_grouped_mm": of("grouped_mm"), "apart_of_dense": of("dense", "apart"),
                    "apart_of_eager": of("eager", "apart"),
                    "products_of_dense": of("dense", "products"),
                    "of_dense_each": each("dense"),
                })  # fmt: skip
    return cells


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
    shares: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(shares[0]) < 3:
        for share, plans in zip(shares, (1, layers), strict=True):
            routing, start = 0.0, time.perf_counter()
            for layer in range(layers):
                if layer < plans:
                    before = time.perf_counter()
                    made = plan()
                    routing += time.perf_counter() - before
                ffn_experts(cell.x, *made, *cell.stacks)
            share.append(routing / (time.perf_counter() - start))
    return median(shares[0][1:]), median(shares[1][1:])


def draw(cells: list[dict[str, Any]]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey=True)
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
    figure.tight_layout()
    return figure


def measured(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(feed-forward cells, routing cells) asked for, beside those of former runs that were not."""
    if given.quick:
        return ffn_cells((8,), tuple(SIZES), 0.1, 3, 1), routing_cells((8,), 0.1)
    cells = ffn_cells(given.tokens, given.size, 6.0, 16, 5)
    routing = routing_cells((64, 512), 1.0) if given.routing else []
    path = Path(__file__).parent / "results" / "cpu_ffn.json"
    old = json.loads(path.read_text()) if path.exists() else {"ffn": [], "routing": []}
    again = {(c["size"], c["tokens"]) for c in cells}
    cells += [c for c in old["ffn"] if (c["size"], c["tokens"]) not in again]
    cells.sort(key=lambda c: (c["size"], c["tokens"], c["what"] != "forward"))
    routing = routing or old["routing"]
    save("cpu_ffn", {"ffn": cells, "routing": routing}, draw(cells))
    return cells, routing


def main() -> None:
    torch.set_num_threads(2)
    if "--task" in sys.argv:
        size, tokens, seconds, rounds = sys.argv[sys.argv.index("cell") + 1 :]
        print(json.dumps(one_process(size, int(tokens), float(seconds), int(rounds))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, few repeats")
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
    finish("cpu", columns, shares, ffn=cells, routing=routing)


if __name__ == "__main__":
    main()
