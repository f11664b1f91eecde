"""What converting costs: memory beside the model's own, time by pass, a 7B model on meta.

``python -m benchmarks.conversion [--quick]``
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from .common import arguments, finish, forget_peak, in_fresh_process, memory_mb

SIZES = {  # width, hidden, layers, heads, vocabulary
    "1MB": (32, 88, 8, 8, 1024),
    "2MB": (64, 176, 8, 8, 1024),
    "4MB": (96, 264, 8, 8, 1024),
    "10MB": (144, 396, 8, 8, 1024),
    "15MB": (176, 484, 8, 8, 1024),
    "20MB": (208, 576, 8, 8, 1024),
    "30MB": (256, 704, 8, 8, 1024),
    "60MB": (384, 1056, 8, 8, 1024),
    "100MB": (512, 1408, 6, 8, 8000),
    "24 layers": (384, 1056, 24, 8, 1024),
    "400MB": (1024, 2816, 6, 16, 16000),
    "1B": (2048, 5504, 16, 16, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
}


def llama(size: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, hidden, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def real(size: str) -> dict[str, Any]:
    """Convert a model with weights, in a process that has converted a tiny one before: what the
    libraries themselves take at first use is not the conversion's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import moe_rewrite

    tiny = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    moe_rewrite.convert(LlamaForCausalLM(tiny).eval())
    model = llama(size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    with torch.no_grad():
        model(torch.zeros(3, 9, dtype=torch.long))
    forget_peak()
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    moe = moe_rewrite.convert(model)
    seconds = time.perf_counter() - start
    grown = memory_mb("VmHWM") - before
    return {
        "weights_mb": weights, "grown_mb": grown, "share": grown / weights, "seconds": seconds,
        "passes": moe.report.seconds,
    }  # fmt: skip


def meta(size: str) -> dict[str, Any]:
    """Convert a model on the meta device; peak memory is the whole process's."""
    import moe_rewrite

    with torch.device("meta"):
        model = llama(size)
    start = time.perf_counter()
    moe = moe_rewrite.convert(model)
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters, "seconds": seconds, "peak_mb": memory_mb("VmHWM"),
        "sites": len(moe.report.sites), "passes": moe.report.seconds,
    }  # fmt: skip


def main() -> None:
    if "--task" in sys.argv:
        task, size = sys.argv[sys.argv.index("--task") + 1 :][:2]
        torch.set_num_threads(2)
        print(json.dumps({"real": real, "meta": meta}[task](size)))
        return
    quick = arguments(__doc__ or "").quick
    on_cpu = in_fresh_process("benchmarks.conversion", "real", "100MB" if quick else "400MB")
    on_meta = in_fresh_process("benchmarks.conversion", "meta", "1B" if quick else "7B")
    rows = [
        (f"{on_cpu['weights_mb']:.0f} MB of weights", f"{on_cpu['seconds']:.1f} s",
         f"+{on_cpu['grown_mb']:.0f} MB ({100 * on_cpu['share']:.1f}%)"),
        (f"{on_meta['parameters'] / 1e9:.1f}B parameters on meta", f"{on_meta['seconds']:.1f} s",
         f"{on_meta['peak_mb']:.0f} MB, the whole process"),
    ]  # fmt: skip
    finish("conversion", ["model", "time", "peak memory"], rows, cpu=on_cpu, meta=on_meta)


if __name__ == "__main__":
    main()
