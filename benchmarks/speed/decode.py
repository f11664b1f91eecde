"""A generated token on the converted graph against the dense model in Hugging Face eager.

``python -m benchmarks.decode [--quick]``: batch 1, greedy, one expert, both models in turn.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import moe_rewrite

from .common import arguments, finish


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        vocab_size=32000, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stories() -> torch.nn.Module | None:
    """The pretrained Llama of the shared data, where it is at hand."""
    from transformers import AutoModelForCausalLM

    folder = Path(os.environ.get("MOE_REWRITE_DATA", "../shared")) / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval() if folder.exists() else None


def seconds_per_token(model: Any, tokens: int) -> tuple[float, torch.Tensor]:
    ids = torch.arange(3, 19).unsqueeze(0)
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip
    return (time.perf_counter() - start) / tokens, out


def compare(model: torch.nn.Module, tokens: int, repeats: int) -> dict[str, float]:
    """Medians over pairs that run one after the other; the first pair is not counted."""
    moe = moe_rewrite.convert(model)
    pairs = []
    for _ in range(repeats + 1):
        dense, expected = seconds_per_token(model, tokens)
        ours, got = seconds_per_token(moe, tokens)
        assert torch.equal(expected, got), "the converted model says something else"
        pairs.append((dense, ours))
    kept = pairs[1:]
    return {
        "dense_ms": 1e3 * median(d for d, _ in kept),
        "moe_ms": 1e3 * median(o for _, o in kept),
        "ratio": median(o / d for d, o in kept),
    }


def main() -> None:
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(2)
    tokens, repeats = (16, 3) if quick else (100, 9)
    models = {"Llama, 8 layers, width 512": llama(), "stories260K": stories()}
    figures = {n: compare(m, tokens, repeats) for n, m in models.items() if m is not None}
    rows = [
        (n, f"{f['dense_ms']:.2f} ms", f"{f['moe_ms']:.2f} ms", f"{f['ratio']:.3f}")
        for n, f in figures.items()
    ]
    finish("decode", ["model", "dense", "converted", "ratio"], rows, **figures)


if __name__ == "__main__":
    main()
