"""Time and memory of a converted Llama against tokens, experts, rank and layers."""

# python -m benchmarks.speed.scaling [--quick]: width 256, 2 threads; one size is changed at a time.
# Time is of the processor in a training step (growth is asked for, and what else the machine does must
# not show), memory what autograd keeps for the backward pass and the experts' weights.

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, MoEModel, TokenRouter

from ..tools.memory import kept_for_backward
from ..tools.models import llama
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save
from ..tools.timing import alone, processor

WIDTH, BASE = 256, {"tokens": 512, "experts": 8, "rank": 8, "layers": 4}
SIZES = {
    "tokens": (32, 128, 512, 2048), "experts": (2, 8, 32), "rank": (2, 8, 32),
    "layers": (1, 4, 8),
}  # fmt: skip


def model(kind: str, size: dict[str, int]) -> MoEModel:
    """One shallow block and `layers` deep ones. kind: lora, or upcycle with two experts a row."""
    dense = llama(size["layers"] + 1, WIDTH)
    if kind == "lora":
        given: dict[str, Any] = {"experts": LoRAExperts(rank=size["rank"])}
    else:
        top_k = min(2, size["experts"])
        router = TokenRouter(top_k=top_k, base=False, init=1.0)
        given = {"mode": "upcycle", "experts": FFNExperts(), "router": router}
    moe = moe_rewrite.convert(dense, split=1, num_experts=size["experts"], verify=False, **given)
    assert isinstance(moe, MoEModel)
    return moe


def measure(moe: MoEModel, size: dict[str, int], rounds: int) -> dict[str, float]:
    ids = torch.randint(0, 1024, (4, size["tokens"] // 4))

    def forward() -> torch.Tensor:
        return moe(input_ids=ids, labels=ids, use_cache=False).loss

    def step() -> None:
        forward().backward()
        moe.zero_grad()

    experts = [p for site in moe.expert_sites() for part in site.parameter_lists() for p in part]
    own = {p.untyped_storage().data_ptr() for p in moe.parameters()}
    return {
        "step_ms": alone(step, rounds, clock=processor), "kept_mb": kept_for_backward(forward, lambda t: t.untyped_storage().data_ptr() in own),
        "experts_mb": sum(p.numel() * p.element_size() for p in experts) / 1e6,
    }  # fmt: skip


def slope(sizes: list[int], values: list[float]) -> float:
    """The slope of log value by log size, over the last two sizes: 1 is linear growth, 0 none."""
    return float(np.diff(np.log(values[-2:]))[0] / np.diff(np.log(sizes[-2:]))[0])


def axis_of(kind: str, base: MoEModel, axis: str, sizes: Any, rounds: int) -> dict[int, Any]:
    """Figures by size; base: the model of the sizes that are not changed."""
    found = {}
    for n in sizes:
        size = BASE | {axis: n}
        moe = base if axis == "tokens" or size == BASE else model(kind, size).train()
        found[n] = measure(moe, size, rounds)
    return found


def row(kind: str, axis: str, found: dict[int, dict[str, float]]) -> tuple[str, ...]:
    sizes, measures = list(found), list(found.values())
    growth = [slope(sizes, [m[k] for m in measures]) for k in ("step_ms", "kept_mb", "experts_mb")]
    first, last = measures[0]["step_ms"], measures[-1]["step_ms"]
    span = f"{sizes[0]}..{sizes[-1]}"
    return kind, axis, span, f"{first:.1f} .. {last:.1f} ms", *(f"{g:.2f}" for g in growth)


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    rounds = 1 if quick else 4
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {"lora": {}, "upcycle": {}}
    for kind, by_axis in found.items():
        base = model(kind, BASE).train()
        for axis, sizes in SIZES.items():
            if axis != "rank" or kind == "lora":
                asked = sizes[:2] if quick else sizes
                by_axis[axis] = axis_of(kind, base, axis, asked, rounds)
    if not quick:
        save("scaling", {"base": BASE, "by_size": found}, draw(found))
    rows = [row(kind, axis, f) for kind, by_axis in found.items() for axis, f in by_axis.items()]
    columns = ["experts", "axis", "sizes", "step", "time grows as n^", "kept n^", "weights n^"]
    finish("scaling", columns, rows, by_size=found)


def draw(found: dict[str, Any]) -> Any:
    figure, axes = subplots(2, 4, (14, 6))
    labels = {"step_ms": "step, ms", "kept_mb": "kept, MB"}
    for column, axis in enumerate(SIZES):
        for row, (key, label) in enumerate(labels.items()):
            for kind, by_axis in found.items():
                if axis in by_axis:
                    values = [m[key] for m in by_axis[axis].values()]
                    axes[row, column].loglog(list(by_axis[axis]), values, marker="o", label=kind)
            axes[row, column].set(xlabel=axis, ylabel=label)
    axes[0, 0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
