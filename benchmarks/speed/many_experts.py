"""Forward calls of a model with 300 experts beside one with 20, one expert a row."""

# python -m benchmarks.speed.many_experts [--quick]: a Llama of width 256, five layers, LoRA of rank 8 on
# the last four, one thread, processor time, side by side.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter

from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor, side_by_side

WIDTH = 256
COUNTS = (20, 300), (4, 20)  # of experts; quick


def routed_llama(experts: int) -> MoEModel:
    """LoRA of rank 8 on the last four of five layers; an expert's texts have a vocabulary of 16."""
    router = TokenRouter(fit="analytic", granularity="prefix", top_k=1, base=False)
    moe = moe_rewrite.convert(llama(5, WIDTH), split=1, router=router, verify=False)
    assert isinstance(moe, MoEModel)
    moe.expand(experts - 1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in moe.expert_sites():
            for b in site.parameter_lists()[1]:
                b.copy_(torch.randn(b.shape, generator=draw) * 0.02)
    for expert in range(experts):
        moe.fit_router(expert, [{"input_ids": text(expert, 4, 64)}])
        moe.activate(expert)
    return moe.eval()


def text(expert: int, batch: int, length: int) -> torch.Tensor:
    words = torch.randperm(1024, generator=torch.Generator().manual_seed(expert))[:16]
    draw = torch.Generator().manual_seed(5000 + expert)
    return words[torch.randint(16, (batch, length), generator=draw)]


def forward(counts: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Processor milliseconds of calls, by number of experts, and their ratio."""
    models = {n: routed_llama(n) for n in counts}
    few = counts[0]
    calls = {
        "8 texts of 64 tokens": torch.cat([text(e * (few // 8 or 1) % few, 1, 64) for e in range(8)]),
        "1 text of 512 tokens": text(1, 1, 512), "1 token": text(2, 1, 1),
        "512 random tokens": torch.randint(1024, (512, 1), generator=torch.Generator().manual_seed(1)),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, ids in calls.items():

        def run(moe: MoEModel, ids: torch.Tensor = ids) -> Callable[[], None]:
            def call() -> None:
                with torch.no_grad():
                    for _ in range(1 if ids.numel() > 1 else 10):
                        moe(input_ids=ids, use_cache=False)

            return call

        times = side_by_side({str(n): run(m) for n, m in models.items()}, rounds, clock=processor)
        many, base = (str(n) for n in reversed(counts))
        with torch.no_grad():
            taken = {n: len(m.route(input_ids=ids).selected.unique()) for n, m in models.items()}
        found[name] = {
            "ms": {n: t / (1 if ids.numel() > 1 else 10) for n, t in times.medians().items()},
            "ratio": times.ratio(many, base), "taken": taken,
        }  # fmt: skip
    return found


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    few, many = counts = COUNTS[quick]
    found = forward(counts, 2 if quick else 9)
    if not quick:
        save("many_experts", {"counts": counts, "calls": found})
    rows = [
        (
            name, *(f"{f['ms'][str(n)]:.2f} ms" for n in counts), f"{f['ratio']:.2f}",
            f"{f['taken'][few]}, {f['taken'][many]}",
        )
        for name, f in found.items()
    ]  # fmt: skip
    columns = ["call", f"{few} experts", f"{many} experts", "ratio", "experts taken"]
    finish("many_experts", columns, rows, calls=found)


if __name__ == "__main__":
    main()
