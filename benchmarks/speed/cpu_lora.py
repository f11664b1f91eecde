"""A converted Llama on the CPU against the dense model and PEFT: forward and training step."""

# python -m benchmarks.speed.cpu_lora [--quick]: 8 layers of width 512, FFN 1408, 4 x 128 tokens,
# LoRA experts of rank 8 on all linears of the deep half, 2 threads; medians of rounds side by side.
# Training: with convert's default router, which is solved in closed form, and with one that is
# trained. Kept: MB of activations that a training forward keeps for the backward pass, parameters
# left out.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tools.memory import kept_beside
from ..tools.models import llama, llama_with_experts, training_step
from ..tools.report import finish, is_quick, save
from ..tools.timing import Times, side_by_side

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


def measured(quick: bool) -> tuple[dict[str, Times], dict[str, float]]:
    """(times of forward and training step, MB kept for the backward pass)."""
    layers, width, experts, rounds = (4, 128, 4, 3) if quick else (8, 512, 8, 15)
    ids = torch.randint(0, 1024, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def forward(model: Any) -> Callable[[], Any]:
        model.eval()
        return lambda: model(**inputs)

    def step(model: Any) -> Callable[[], Any]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
        return training_step(lambda: model(**inputs, labels=ids).loss, optimizer)

    def kept(model: Any) -> float:
        return round(kept_beside(model, lambda: model(**inputs, labels=ids).loss), 1)

    many, size = f"ours, {experts} experts", (layers, width)
    peer = f"PEFT, {experts} adapters"
    forwards = {
        "dense": forward(llama(*size)), many: forward(llama_with_experts(*size, experts)),
        peer: forward(with_peft(*size, experts)),
    }  # fmt: skip
    with torch.no_grad():
        times = side_by_side(forwards, rounds)
    del forwards
    trained = {
        "PEFT, 1 adapter": with_peft(*size, 1),
        many: llama_with_experts(*size, experts, fit="analytic"),
        f"{many}, router by gradient": llama_with_experts(*size, experts),
        peer: with_peft(*size, experts),
    }  # fmt: skip
    steps = {name: step(model) for name, model in trained.items()}
    found = {"forward": times, "training step": side_by_side(steps, rounds)}
    return found, {name: kept(model) for name, model in trained.items()}


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    found, kept = measured(quick)
    middle = {what: times.medians() for what, times in found.items()}
    figures = {
        "milliseconds": middle, "quartiles": {what: t.quartiles() for what, t in found.items()},
        "kept_MB": kept,
    }  # fmt: skip
    if not quick:
        save("cpu_lora", figures)
    rows = []
    for what, times in middle.items():
        base = next(iter(times.values()))
        held = kept if what == "training step" else {}
        rows += [
            (what, n, f"{t:.1f} ms", f"{t / base:.2f}", f"{held[n]} MB" if held else "")
            for n, t in times.items()
        ]
    finish("cpu_lora", ["", "model", "time", "ratio", "kept for backward"], rows, **figures)


if __name__ == "__main__":
    main()
