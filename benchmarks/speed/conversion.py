"""Cost of conversion: memory in addition to the model's, time by pass, a 7B model on meta."""

# python -m benchmarks.speed.conversion [--quick]

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import moe_rewrite

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.memory import peak_memory, peak_of
from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import timed

SIZES = {  # layers, width, hidden, heads, vocabulary
    "1MB": (8, 32, 88, 8, 1024),
    "2MB": (8, 64, 176, 8, 1024),
    "4MB": (8, 96, 264, 8, 1024),
    "10MB": (8, 144, 396, 8, 1024),
    "15MB": (8, 176, 484, 8, 1024),
    "20MB": (8, 208, 576, 8, 1024),
    "30MB": (8, 256, 704, 8, 1024),
    "60MB": (8, 384, 1056, 8, 1024),
    "100MB": (6, 512, 1408, 8, 8000),
    "24 layers": (24, 384, 1056, 8, 1024),
    "400MB": (6, 1024, 2816, 16, 16000),
    "1B": (16, 2048, 5504, 16, 32000),
    "7B": (32, 4096, 11008, 32, 32000),
}


def real(size: str) -> dict[str, Any]:
    """Convert a model with weights, in a process that has converted a tiny one before: what the
    libraries themselves take at first use is not the conversion's."""
    moe_rewrite.convert(llama(2, 32))
    model = llama(*SIZES[size])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    with torch.no_grad():
        model(torch.zeros(3, 9, dtype=torch.long))
    (moe, seconds), grown = peak_of(partial(timed, lambda: moe_rewrite.convert(model)))
    return {
        "weights_mb": weights, "grown_mb": grown, "share": grown / weights, "seconds": seconds,
        "passes": moe.report.seconds,
    }  # fmt: skip


def meta(size: str) -> dict[str, Any]:
    """Convert a model on the meta device; peak memory is the whole process's."""
    with torch.device("meta"):
        model = llama(*SIZES[size])
    moe, seconds = timed(lambda: moe_rewrite.convert(model))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters, "seconds": seconds, "peak_mb": peak_memory(),
        "sites": len(moe.report.sites), "passes": moe.report.seconds,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    if answer(real, meta):
        return
    quick = is_quick(__doc__)
    on_cpu = in_fresh_process(real, "100MB" if quick else "400MB")
    on_meta = in_fresh_process(meta, "1B" if quick else "7B")
    figures = {"cpu": on_cpu, "meta": on_meta}
    if not quick:
        save("conversion", figures)
    rows = [
        (f"{on_cpu['weights_mb']:.0f} MB of weights", f"{on_cpu['seconds']:.1f} s",
         f"+{on_cpu['grown_mb']:.0f} MB ({100 * on_cpu['share']:.1f}%)"),
        (f"{on_meta['parameters'] / 1e9:.1f}B parameters on meta", f"{on_meta['seconds']:.1f} s",
         f"{on_meta['peak_mb']:.0f} MB, the whole process"),
    ]  # fmt: skip
    finish("conversion", ["model", "time", "peak memory"], rows, **figures)


if __name__ == "__main__":
    main()
