"""A converted Llama on the CPU against the dense model and PEFT: forward and training step.

``python -m benchmarks.cpu_lora [--quick]``: 8 layers of width 512, FFN 1408, 4 x 128 tokens, LoRA
experts of rank 8 on all linears of the deep half, 2 threads. Medians of runs that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import MoEModel

from .common import arguments, finish
from .features import llama

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


def with_peft(layers: int, width: int, adapters: int) -> Any:
    """PEFT on the same sites: the deep half's linears; all adapters on, the last one trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=LINEARS.split(),
        layers_to_transform=list(range(layers // 2, layers)),
    )  # fmt: skip
    names = [f"task{i}" for i in range(adapters)]
    model = get_peft_model(llama(layers, width), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.requires_grad_(f".{names[-1]}." in name)
                if "lora_B" in name:
                    p.normal_(0, 0.02)
    return model


def ours(layers: int, width: int, experts: int, **given: Any) -> MoEModel:
    """Experts that came one by one: the older ones are frozen, the newest is trained."""
    moe = moe_rewrite.convert(llama(layers, width), split=layers // 2, **given)
    assert isinstance(moe, MoEModel)
    for _ in range(experts - 1):
        moe.expand()
    for index in range(experts):
        moe.activate(index)
    with torch.no_grad():
        for site in moe.expert_sites():
            for b in site.parameter_lists()[1]:
                b.normal_(0, 0.02)
        for row in moe.router.rows:
            row.normal_(0, 0.02)
    return moe


def rounds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, the median over rounds in which all take turns; two rounds to warm."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values[2:]) for name, values in spent.items()}


def cells(quick: bool) -> dict[str, dict[str, float]]:
    layers, width, experts, repeats = (4, 128, 4, 3) if quick else (8, 512, 8, 15)
    ids = torch.randint(0, 1024, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def forward(model: Any) -> Callable[[], Any]:
        model.eval()

        def run() -> None:
            with torch.no_grad():
                model(**inputs)

        return run

    def step(model: Any) -> Callable[[], Any]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)

        def run() -> None:
            optimizer.zero_grad()
            model(**inputs, labels=ids).loss.backward()
            optimizer.step()

        return run

    many = f"ours, {experts} experts"
    size = (layers, width)
    forwards = rounds(
        {
            "dense": forward(llama(*size)), many: forward(ours(*size, experts)),
            f"PEFT, {experts} adapters": forward(with_peft(*size, experts)),
        },
        repeats,
    )  # fmt: skip
    steps = rounds(
        {
            "PEFT, 1 adapter": step(with_peft(*size, 1)), many: step(ours(*size, experts)),
            f"PEFT, {experts} adapters": step(with_peft(*size, experts)),
        },
        repeats,
    )  # fmt: skip
    return {"forward": forwards, "training step": steps}


def main() -> None:
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(2)
    found = cells(quick)
    rows = []
    for what, times in found.items():
        base = next(iter(times.values()))
        rows += [(what, n, f"{t:.1f} ms", f"{t / base:.2f}") for n, t in times.items()]
    finish("cpu_lora", ["", "model", "time", "ratio"], rows, milliseconds=found)


if __name__ == "__main__":
    main()
