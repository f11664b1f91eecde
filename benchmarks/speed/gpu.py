"""Routed work on a GPU against dense work and the peers: ``python -m benchmarks.gpu [--quick]``.

bf16, medians of warm calls, all forms in turn. TFLOP/s count the products alone; the share is of
the rate of one dense product, which has its turn in every round too: a chip that is hot does less,
for all of them. Peers: transformers' grouped_mm, a plain pipeline over F.grouped_mm, and ScatterMoE's and Liger's kernels where they are installed (Liger tunes itself at every shape, but not
with LIGER_FUSED_MOE_AUTOTUNE=0).
Without a GPU the kernels run in Triton's interpreter, in fp32 at tiny sizes: that shows that the
script runs to its end, its times say nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.plan.op import route, sort_plan

from .common import arguments, finish, save

Step = Callable[[], torch.Tensor]


class Place(NamedTuple):
    device: str
    dtype: torch.dtype
    repeats: int

    def randn(self, *size: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        made = torch.randn(*size, device=self.device, dtype=self.dtype) * scale
        return made.requires_grad_(grad)


def there(repeats: int) -> Place:
    """The GPU in bf16; without one Triton's interpreter, which is switched on by this."""
    if torch.cuda.is_available():
        return Place("cuda", torch.bfloat16, repeats)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    return Place("cpu", torch.float32, 1)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter on the CPU"


class Shape(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    def __str__(self) -> str:
        return f"T{self.tokens} d{self.width} n{self.hidden} E{self.experts} k{self.k}"

    def flops(self) -> float:
        """Of the three products of a forward pass."""
        return 6.0 * self.tokens * self.k * self.width * self.hidden


GOALS = {  # share of the dense product's rate: forward, backward (issue D, 5)
    Shape(32768, 4096, 2048, 64, 4): (0.65, 0.55), Shape(32768, 4096, 256, 256, 16): (0.50, 0.42),
    Shape(512, 4096, 2048, 64, 4): None, Shape(32768, 4096, 14336, 8, 2): None,
}  # fmt: skip
TINY = {Shape(24, 16, 8, 4, 2): None}


def milliseconds(steps: dict[str, Step], place: Place) -> dict[str, float]:
    """Median of each, all in turn in every round, after one round that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(place.repeats + 1):
        for name, step in steps.items():
            spent[name].append(_once(step, place))
    return {name: median(times[1:]) for name, times in spent.items()}


def _once(step: Step, place: Place) -> float:
    if place.device != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Dense:
    """One square product."""

    def __init__(self, place: Place) -> None:
        self.n = 8192 if place.device == "cuda" else 64
        self.a, self.b = (place.randn(self.n, self.n, grad=False) for _ in range(2))

    def run(self) -> torch.Tensor:
        return self.a @ self.b

    def tflops(self, milliseconds: float) -> float:
        return 2 * self.n**3 / milliseconds / 1e9


class Experts:
    """One shape's inputs and its forms."""

    def __init__(self, shape: Shape, place: Place) -> None:
        torch.manual_seed(0)
        T, D, H, E, K = shape
        self.shape, self.place = shape, place
        self.x, self.direction = place.randn(T, D), place.randn(T, D, grad=False)
        gates, self.chosen = route(torch.randn(T, E, device=place.device), K)
        self.gates = gates.detach().requires_grad_()
        self.plan = sort_plan(self.chosen, E)
        self.up, self.gate = (place.randn(E, H, D, scale=D**-0.5) for _ in range(2))
        self.down = place.randn(E, D, H, scale=H**-0.5)

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.gates, self.up, self.down, self.gate]

    def ours(self) -> torch.Tensor:
        return ffn_experts(
            self.x, self.gates, self.chosen, self.plan, self.up, self.down, self.gate
        )

    def grouped(self) -> torch.Tensor:
        """The plain pipeline: gather, two products in one, activation, product, weighed sum."""
        order, offsets, inverse = self.plan
        ends = offsets[1:].to(torch.int32)
        given = self.x[order // self.shape.k]

        def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(a, w.transpose(1, 2), offs=ends)

        hidden = F.silu(product(given, self.gate)) * product(given, self.up)
        y = product(hidden, self.down)[inverse].view(*self.gates.shape, -1)
        return (y * self.gates.unsqueeze(-1).to(y.dtype)).sum(1)

    def forms(self) -> dict[str, Step]:
        found: dict[str, Step] = {"ours": self.ours}
        for name, make in (
            ("F.grouped_mm", lambda: self.grouped), ("transformers", self._transformers),
            ("ScatterMoE", self._scattermoe), ("Liger", self._liger),
        ):  # fmt: skip
            try:
                run = make()
                if run is not None:
                    far = (run() - self.ours()).norm() / self.ours().norm()
                    if not far < 0.05:
                        raise RuntimeError(f"its result is {far:.3g} off")
                    found[name] = run
            except (ImportError, RuntimeError, TypeError, AttributeError) as error:
                print(f"{self.shape}: {name} left out: {str(error).splitlines()[0]}")
        return found

    def _transformers(self) -> Step | None:
        if find_spec("transformers") is None:
            return None
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        _, width, hidden, experts, k = self.shape
        config = Qwen3MoeConfig(
            hidden_size=width, moe_intermediate_size=hidden, num_experts=experts,
            num_experts_per_tok=k, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        peer = Qwen3MoeExperts(config).to(self.place.device, self.place.dtype)
        both = torch.cat([self.gate, self.up], 1).detach()
        peer.load_state_dict({"gate_up_proj": both, "down_proj": self.down.detach()})
        return lambda: peer(self.x, self.chosen, self.gates.to(self.x.dtype))

    def _scattermoe(self) -> Step | None:
        if find_spec("scattermoe") is None or self.place.device != "cuda":
            return None
        from scattermoe.mlp import GLUMLP

        _, width, hidden, experts, k = self.shape
        peer = GLUMLP(width, hidden, experts, k, activation=torch.nn.SiLU())
        peer = peer.to(self.place.device, self.place.dtype)
        return lambda: peer(self.x, self.gates.to(self.x.dtype), self.chosen)

    def _liger(self) -> Step | None:
        if find_spec("liger_kernel") is None or self.place.device != "cuda":
            return None
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        both = torch.cat([self.gate, self.up], 1).detach().requires_grad_()
        run, chosen = LigerFusedMoEFunction.apply, self.chosen.int()
        return lambda: run(self.x, both, self.down, chosen, self.gates.to(self.x.dtype))

    def measure(self, dense: Dense) -> dict[str, dict[str, float]]:
        """Milliseconds of each form and of the dense product beside it: forward alone, and forward
        with backward."""
        forms = self.forms()
        with torch.no_grad():
            ahead = milliseconds(forms | {"dense": dense.run}, self.place)
        steps = {name: trained(run, self.direction, self.leaves()) for name, run in forms.items()}
        both = milliseconds(steps | {"dense": dense.run}, self.place)
        return {n: {"forward": ahead[n], "both": both[n]} for n in ahead}


def trained(run: Step, direction: torch.Tensor, leaves: list[torch.Tensor]) -> Step:
    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = run()
        y.backward(direction)
        return y

    return step


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(c["shape"] for c in cells))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 4), sharey=True)
    for axis, shape in zip(axes, shapes, strict=True):
        own = [c for c in cells if c["shape"] == shape]
        for i, what in enumerate(("forward", "backward")):
            places = [n + 0.4 * i for n in range(len(own))]
            axis.bar(places, [c["share"][what] for c in own], width=0.4, label=what)
        axis.set_xticks(range(len(own)), [c["form"] for c in own], rotation=30, fontsize=8)
        axis.set_title(shape, fontsize=9)
    axes[0].set_ylabel("share of a dense product's rate")
    axes[0].legend()
    figure.tight_layout()
    return figure


def main() -> None:
    quick = arguments(__doc__ or "").quick
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
