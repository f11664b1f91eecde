"""A training step with features at the cut at hand, against the step without.

``python -m benchmarks.features [--quick]``: an 8-layer Llama of width 512, split in the middle, one
LoRA expert, 4 x 128 tokens, 2 threads; medians of steps in turn, losses compared.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

import moe_rewrite
from moe_rewrite import MoEModel
from moe_rewrite.continual.features import FeatureCache

from .common import arguments, finish


def llama(layers: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
        )  # fmt: skip
    ).eval()


def main() -> None:
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(2)
    layers, width, repeats = (4, 128, 5) if quick else (8, 512, 15)
    moe = moe_rewrite.convert(llama(layers, width), split=layers // 2)
    assert isinstance(moe, MoEModel)
    moe.train()
    cache = FeatureCache(moe)
    ids = torch.randint(0, 1024, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=0.0)

    def step(known: torch.Tensor | None) -> float:
        if known is None:
            loss = moe(**inputs, labels=ids, use_cache=False).loss
        else:
            with moe.use_features(known):
                loss = moe(**inputs, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    spent: dict[str, list[float]] = {"without": [], "with": []}
    losses = {}
    for _ in range(repeats + 2):
        for name in spent:
            start = time.perf_counter()
            losses[name] = step(cache.features(inputs) if name == "with" else None)
            spent[name].append(1e3 * (time.perf_counter() - start))
    times = {name: median(values[2:]) for name, values in spent.items()}
    ratio = times["with"] / times["without"]
    rows = [(n, f"{times[n]:.1f} ms", f"{losses[n]:.6f}") for n in times]
    finish(
        "features", ["features at hand", "step", "loss"], [*rows, ("ratio", f"{ratio:.3f}", "")],
        milliseconds=times, ratio=ratio, difference=abs(losses["with"] - losses["without"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
