"""LoRA experts on models that route already, against PEFT's target_parameters, on the CPU."""

# python -m benchmarks.speed.routed_bases [--quick]: a Qwen3-MoE of 4 layers of width 256 with 32
# experts of width 192, 4 a token, fp32; one expert of rank 8 on the weights of the model's own experts
# and on attention, in all layers. Time of a training step with 4 x 128, 4 x 32 and 4 x 8 tokens:
# medians of rounds, side by side; that of ours with experts on the queries alone is what the frozen
# model itself takes. Peak (4 x 128 tokens): of a step after the first, above what is in use before,
# each in a fresh process. Kept: what the forward pass keeps for the backward one, parameters left out.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import moe_rewrite

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.memory import kept_for_backward, peak_of
from ..tools.models import training_step
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor, side_by_side

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FROZEN = "ours, queries alone"
NAMES = ("ours", "PEFT", FROZEN)
LENGTHS = (128, 32, 8)


def base(quick: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    width, layers = (64, 2) if quick else (256, 4)
    config = Qwen3MoeConfig(
        hidden_size=width, intermediate_size=width, moe_intermediate_size=3 * width // 4,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4,
        num_experts=8 if quick else 32, num_experts_per_tok=4, vocab_size=1024,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def ours(quick: bool, sites: tuple[str, ...]) -> nn.Module:
    return moe_rewrite.convert(
        base(quick).eval(), split=0, experts=moe_rewrite.LoRAExperts(rank=8, sites=sites),
        router=moe_rewrite.TokenRouter(granularity="prefix"), verify=False,
    )  # fmt: skip


def peft(quick: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, target_parameters=STACKS)
    return get_peft_model(base(quick), config)  # type: ignore[arg-type]


def step_of(
    name: str, quick: bool, length: int = LENGTHS[0]
) -> tuple[nn.Module, Callable[[], torch.Tensor], Callable]:
    """(model, its loss, a training step)."""
    sites = ("q_proj",) if name == FROZEN else (*ATTENTION, *STACKS)
    model = (peft(quick) if name == "PEFT" else ours(quick, sites)).train()
    ids = torch.randint(0, 1024, (4, length), generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    return model, loss, training_step(loss, torch.optim.AdamW(trained, 1e-4))


def memory(name: str, quick: bool) -> dict[str, float]:
    """MB at the peak of a step, and kept for the backward pass."""
    model, loss, step = step_of(name, quick)
    step()
    _, peak = peak_of(step)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = kept_for_backward(loss, lambda t: t.untyped_storage().data_ptr() in own)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"peak": round(peak, 1), "kept": round(kept, 1), "trained": trained / 1e6}


def times(quick: bool, length: int) -> dict[str, Any]:
    """Milliseconds of the processor for a step, and ratios to PEFT's."""
    steps = {name: step_of(name, quick, length)[2] for name in NAMES}
    rounds, seconds = (3, 1.0) if quick else (9, 60.0)
    found = side_by_side(steps, rounds, seconds=seconds, clock=processor)
    ratios = {n: found.ratio(n, to="PEFT") for n in NAMES}
    return {"ms": found.medians(), "of_peft": ratios}


def main() -> None:
    torch.set_num_threads(2)
    if answer(memory, times):
        return
    quick = is_quick(__doc__)
    lengths = LENGTHS[1:] if quick else LENGTHS
    run = (lambda work, *args: work(*args)) if quick else in_fresh_process
    steps = {n: run(times, quick, n) for n in lengths}
    held = {n: run(memory, n, quick) for n in NAMES}
    figures = {"step": {f"4 x {n}": step for n, step in steps.items()}, "memory": held}
    if not quick:
        save("routed_bases", figures)
    columns = ["", *(f"step, {4 * n} tokens" for n in lengths), "peak", "kept for backward"]
    rows = []
    for name in NAMES:
        of_peft = (
            f"{step['ms'][name]:.0f} ms ({step['of_peft'][name]:.2f})" for step in steps.values()
        )
        rows.append((name, *of_peft, *(f"{held[name][k]:.1f} MB" for k in ("peak", "kept"))))
    finish("routed_bases", columns, rows, **figures)


if __name__ == "__main__":
    main()
