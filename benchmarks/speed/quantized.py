"""LoRA experts on quantised bases, on the CPU: memory of a training step."""

# python -m benchmarks.speed.quantized [--quick]: a Llama of 8 layers of width 512, FFN 1408, 4 x 128
# tokens, one expert of rank 8 on all linear maps of the deep half, all but the head quantised.
# Weights: all as they are stored, experts too. Kept: what the forward pass keeps for the backward one,
# parameters left out. Peak: of a step after the first, above what is in use before, each in a fresh
# process. PEFT: its own LoRA layers on the same sites of the same quantised model.

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import moe_rewrite
from moe_rewrite.utils.quantized import stored_bytes

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.memory import kept_beside, peak_of
from ..tools.models import llama, training_step
from ..tools.report import finish, is_quick, save
from .cpu_lora import LINEARS

SCHEMES = ("float32", "torchao int8", "torchao int4", "bitsandbytes nf4", "bitsandbytes 8 bit")
BY_PEFT = "float32", "torchao int8", "bitsandbytes nf4"


def with_torchao(model: nn.Module, bits: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    four = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    linears = tuple(LINEARS.split())
    quantize_(
        model, four if bits == 4 else Int8WeightOnlyConfig(), lambda m, name: name.endswith(linears)
    )
    return model


def with_bitsandbytes(model: nn.Module, bits: int) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, old in list(model.named_modules()):
        if not name.endswith(tuple(LINEARS.split())):
            continue
        sizes: Any = old.in_features, old.out_features, old.bias is not None
        new: Any = (
            Linear4bit(*sizes, quant_type="nf4") if bits == 4
            else Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        )  # fmt: skip
        new.load_state_dict(old.state_dict())
        model.set_submodule(name, new)
    return model.to("cpu")


def base(scheme: str, layers: int, width: int) -> nn.Module:
    library, _, kind = scheme.partition(" ")
    bits = 4 if kind in ("int4", "nf4") else 8
    model = llama(layers, width)
    if library == "float32":
        return model
    return (with_torchao if library == "torchao" else with_bitsandbytes)(model, bits)


def with_experts(scheme: str, layers: int, width: int) -> Any:
    model = base(scheme, layers, width)
    router = moe_rewrite.TokenRouter(granularity="prefix")
    return moe_rewrite.convert(model, split=layers // 2, router=router, verify=False)


def with_peft(scheme: str, layers: int, width: int) -> Any:
    from peft import LoraConfig, get_peft_model

    deep = list(range(layers // 2, layers))
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=LINEARS.split(), layers_to_transform=deep
    )
    return get_peft_model(base(scheme, layers, width), config)  # type: ignore[arg-type]


def cell(scheme: str, by: str, quick: bool) -> dict[str, float]:
    """MB of weights, kept for the backward pass, and at the peak of a step."""
    layers, width = (2, 128) if quick else (8, 512)
    model = (with_experts if by == "ours" else with_peft)(scheme, layers, width).train()
    ids = torch.randint(0, 1024, (4, 16 if quick else 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(t): stored_bytes(t) for t in model.state_dict(keep_vars=True).values()}

    def loss() -> torch.Tensor:
        return model(**inputs, labels=ids).loss

    step = training_step(loss, torch.optim.AdamW(trained, 0.0))
    step()
    _, peak = peak_of(step)
    megabytes = {
        "weights": sum(held.values()) / 1e6,
        "kept": kept_beside(model, loss),
        "peak": peak,
    }
    return {name: round(value, 1) for name, value in megabytes.items()}


def main() -> None:
    if answer(cell):
        return
    quick = is_quick(__doc__)
    cells = [(s, "ours") for s in SCHEMES] + [(s, "PEFT") for s in BY_PEFT]
    if quick:
        found = {(s, "ours"): cell(s, "ours", True) for s in SCHEMES[:2]}
    else:
        with ThreadPoolExecutor(4) as pool:
            made = pool.map(lambda pair: in_fresh_process(cell, *pair, False), cells)
            found = dict(zip(cells, made, strict=True))
    figures = {"cells": [{"base": s, "by": by, **of} for (s, by), of in found.items()]}
    if not quick:
        save("quantized", figures)
    names = ("weights", "kept", "peak")
    rows = [(s, by, *(f"{of[n]:.1f} MB" for n in names)) for (s, by), of in found.items()]
    finish("quantized", ["base", "by", *names], rows, **figures)


if __name__ == "__main__":
    main()
