"""Twenty tasks in a row: how a step's time and the memory grow with the experts.

``python -m benchmarks.growth [--quick]``: a 4-layer Llama of width 128, one expert a task, analytic
router; the slope of a line through the figures, per expert.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter

from .common import arguments, finish, memory_mb, save
from .features import llama


def measure(moe: MoEModel, repeats: int) -> tuple[float, float]:
    """(forward in eval, training step of the newest expert alone) in milliseconds."""
    ids = torch.randint(0, 1024, (4, 64))
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-3)
    times: dict[str, list[float]] = {"forward": [], "step": []}
    for _ in range(repeats):
        moe.eval()
        start = time.perf_counter()
        with torch.no_grad():
            moe(input_ids=ids, use_cache=False)
        times["forward"].append(1e3 * (time.perf_counter() - start))
        moe.train()
        start = time.perf_counter()
        with moe.use_expert(moe.num_experts - 1):
            moe(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times["step"].append(1e3 * (time.perf_counter() - start))
    return median(times["forward"]), median(times["step"])


def main() -> None:
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(2)
    tasks, repeats = (4, 3) if quick else (20, 15)
    router = TokenRouter(fit="analytic", granularity="prefix")
    made = moe_rewrite.convert(llama(4, 128), split=2, router=router)
    assert isinstance(made, MoEModel)
    moe: MoEModel = made
    measure(moe, 5)
    rows: list[tuple[int, float, float, float]] = []
    for number in range(1, tasks + 1):
        if number > 1:
            moe.expand(1)
        moe.fit_router(number - 1, [{"input_ids": torch.randint(0, 1024, (8, 64))}])
        moe.activate(number - 1)
        forward, step = measure(moe, repeats)
        rows.append((number, forward, step, memory_mb("VmRSS")))
    columns: Any = np.array(rows).T
    slopes = {
        name: float(np.polyfit(columns[0], values, 1)[0])
        for name, values in zip(("forward_ms", "step_ms", "memory_mb"), columns[1:], strict=True)
    }
    # curvature: what a quadratic adds over the whole range, as a share of the last figure
    bends = {
        name: float(np.polyfit(columns[0], values, 2)[0] * tasks**2 / values[-1])
        for name, values in zip(("forward_ms", "step_ms", "memory_mb"), columns[1:], strict=True)
    }
    if not quick:
        save("growth", {"rows": rows, "slopes": slopes, "bends": bends}, draw(columns))
    shown = [(n, f"{f:.2f} ms", f"{s:.2f} ms", f"{m:.0f} MB") for n, f, s, m in rows]
    shown.append(("slope", *(f"{v:.3f}" for v in slopes.values())))
    finish("growth", ["experts", "forward", "step", "memory"], shown, slopes=slopes, bends=bends)


def draw(columns: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(9, 3.5))
    times.plot(columns[0], columns[1], marker="o", label="forward, all experts")
    times.plot(columns[0], columns[2], marker="o", label="step of the newest expert")
    times.set(xlabel="experts", ylabel="ms", ylim=0)
    times.legend(fontsize=8)
    memory.plot(columns[0], columns[3], marker="o")
    memory.set(xlabel="experts", ylabel="MB in use", ylim=0)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
