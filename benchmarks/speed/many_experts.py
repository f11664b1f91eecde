"""Forward calls of a model with 300 experts beside one with 20, one expert a row; and beside the same
with the experts off the device until a call uses them: bytes there, and what bringing them costs."""

# python -m benchmarks.speed.many_experts [--quick]: a Llama of width 256, five layers, LoRA of rank 8 on
# the last four, one thread, processor time, side by side. The device is the CPU: bringing an expert is
# a copy within its memory, or out of a mapped file that the system's cache holds.

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import MoEModel, TokenRouter
from moe_rewrite.utils.text_tables import table

from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor, side_by_side

WIDTH = 256
COUNTS = (20, 300), (4, 20)  # of experts; quick
KEEP = 16, 2  # of the experts off the device; quick
PLACES = "on the device", "in memory", "in a mapped file"


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


def off_device(experts: int, keep: int, rounds: int) -> dict[str, Any]:
    """Bytes of experts, and processor milliseconds of calls, by where the weights lie."""
    whole = routed_llama(experts)
    for name in whole.names:
        whole.freeze(name)
    models = {place: copy.deepcopy(whole) for place in PLACES[1:]}
    models[PLACES[1]].offload_experts(keep)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder, model_card=False)
        models[PLACES[2]].offload_experts(keep, folder)
    models = {PLACES[0]: whole, **models}
    calls = {  # (texts, experts in turn, calls): with each next expert there is none of it yet
        "1 token, always one expert": ((1, 1), [1], 20),
        f"1 token, {keep} experts in turn": ((1, 1), list(range(keep)), keep),
        f"1 token, {experts} experts in turn": ((1, 1), list(range(experts)), 20),
        "1 text of 512 tokens, the next expert": ((1, 512), list(range(experts)), 1),
        "8 texts of 64 tokens, as routed": ((8, 64), [], 1),
    }
    times: dict[str, Any] = {}
    for name, (shape, order, count) in calls.items():

        def run(moe: MoEModel, shape: Any = shape, order: Any = order, count: int = count) -> Any:
            turns = itertools.cycle(order or [None])
            batch = text(0, *shape) if order else torch.cat([text(e, 1, 64) for e in range(8)])

            def call() -> None:
                with torch.no_grad():
                    for expert in itertools.islice(turns, count):
                        if expert is None:
                            moe(input_ids=batch, use_cache=False)
                            continue
                        with moe.use_expert(expert):
                            moe(input_ids=batch, use_cache=False)

            return call

        took = side_by_side({p: run(m) for p, m in models.items()}, rounds, clock=processor)
        times[name] = {
            "ms": {place: t / count for place, t in took.medians().items()},
            "ratio": {place: took.ratio(place, PLACES[0]) for place in PLACES[1:]},
        }
    return {"keep": keep, "bytes": {p: m.expert_bytes() for p, m in models.items()}, "calls": times}


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    few, many = counts = COUNTS[quick]
    found = forward(counts, 2 if quick else 9)
    off = off_device(many, KEEP[quick], 2 if quick else 9)
    if not quick:
        save("many_experts", {"counts": counts, "calls": found, "off_device": off})
    rows = [
        (
            name, *(f"{f['ms'][str(n)]:.2f} ms" for n in counts), f"{f['ratio']:.2f}",
            f"{f['taken'][few]}, {f['taken'][many]}",
        )
        for name, f in found.items()
    ]  # fmt: skip
    print_off_device(many, off)
    columns = ["call", f"{few} experts", f"{many} experts", "ratio", "experts taken"]
    finish("many_experts", columns, rows, calls=found, off_device=off)


def print_off_device(experts: int, off: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        (
            "MB of experts on the device",
            *(f"{b['device'] / 1e6:.1f}" for b in off["bytes"].values()),
        )
    ]
    for name, found in off["calls"].items():
        ms, ratio = found["ms"], found["ratio"]
        others = (f"{ms[p]:.2f} ms ({ratio[p]:.2f})" for p in PLACES[1:])
        rows.append((name, f"{ms[PLACES[0]]:.2f} ms", *others))
    title = f"{experts} experts, copies of {off['keep']} stay"
    print(table(["experts lie", *PLACES], rows, title))


if __name__ == "__main__":
    main()
