"""Twenty tasks in a row: how a step's time and the memory grow with the experts."""

# python -m benchmarks.speed.growth [--quick]: a 4-layer Llama of width 128, one expert a task,
# analytic router; the slope of a line through the figures, per expert.

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter

from ..tools.memory import memory_now
from ..tools.models import llama, training_step
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, save
from ..tools.timing import side_by_side

KEYS = ("forward_ms", "step_ms", "memory_mb")


def measure(moe: MoEModel, rounds: int) -> tuple[float, float]:
    """(forward in eval, training step of the newest expert alone) in milliseconds."""
    ids = torch.randint(0, 1024, (4, 64))
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-3)

    def forward() -> None:
        with torch.no_grad():
            moe(input_ids=ids, use_cache=False)

    def loss() -> torch.Tensor:
        return moe(input_ids=ids, labels=ids, use_cache=False).loss

    step = training_step(loss, optimizer)

    def newest() -> None:
        with moe.use_expert(moe.num_experts - 1):
            step()

    times = side_by_side(
        {"forward": forward, "step": newest}, rounds, warm=0,
        before=lambda name: moe.train(name == "step"),
    ).medians()  # fmt: skip
    return times["forward"], times["step"]


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    tasks, rounds = (4, 3) if quick else (20, 15)
    router = TokenRouter(fit="analytic", granularity="prefix")
    moe = moe_rewrite.convert(llama(4, 128), split=2, router=router)
    assert isinstance(moe, MoEModel)
    rows: list[tuple[int, float, float, float]] = []
    for number in range(1, tasks + 1):
        if number > 1:
            moe.expand(1)
        moe.fit_router(number - 1, [{"input_ids": torch.randint(0, 1024, (8, 64))}])
        moe.activate(number - 1)
        if number == 1:
            measure(moe, 5)  # warm
        forward, step = measure(moe, rounds)
        rows.append((number, forward, step, memory_now()))
    columns: Any = np.array(rows).T
    fits = {
        degree: [float(np.polyfit(columns[0], v, degree)[0]) for v in columns[1:]]
        for degree in (1, 2)
    }
    slopes = dict(zip(KEYS, fits[1], strict=True))
    # curvature: the quadratic term over the whole range, relative to the last figure
    bends = {k: f * tasks**2 / v[-1] for k, f, v in zip(KEYS, fits[2], columns[1:], strict=True)}
    if not quick:
        save("growth", {"rows": rows, "slopes": slopes, "bends": bends}, draw(columns))
    shown = [(n, f"{f:.2f} ms", f"{s:.2f} ms", f"{m:.0f} MB") for n, f, s, m in rows]
    shown.append(("slope", *(f"{v:.3f}" for v in slopes.values())))
    finish("growth", ["experts", "forward", "step", "memory"], shown, slopes=slopes, bends=bends)


def draw(columns: Any) -> Any:
    figure, (times, memory) = subplots(1, 2, (9, 3.5))
    times.plot(columns[0], columns[1], marker="o", label="forward, all experts")
    times.plot(columns[0], columns[2], marker="o", label="step of the newest expert")
    times.set(xlabel="experts", ylabel="ms", ylim=0)
    times.legend(fontsize=8)
    memory.plot(columns[0], columns[3], marker="o")
    memory.set(xlabel="experts", ylabel="MB in use", ylim=0)
    return figure


if __name__ == "__main__":
    main()
