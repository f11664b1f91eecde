"""LoRA experts on models that route already, against PEFT's target_parameters, on the CPU."""

# python -m benchmarks.speed.routed_bases [--quick]: a Qwen3-MoE of 4 layers of width 256 with 32
# experts of width 192, 4 a token, 4 x 128 tokens, fp32; one expert of rank 8 on the weights of the
# model's own experts and on attention, in all layers. Time of a training step: medians of rounds, side
# by side. Peak: of a step after the first, above what is in use before, each in a fresh process.
# Kept: what the forward pass keeps for the backward one, parameters left out.

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
NAMES = ("ours", "PEFT")


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


def ours(quick: bool) -> nn.Module:
    sites = (*ATTENTION, *STACKS)
    return moe_rewrite.convert(
        base(quick).eval(), split=0, experts=moe_rewrite.LoRAExperts(rank=8, sites=sites),
        router=moe_rewrite.TokenRouter(granularity="prefix"), verify=False,
    )  # fmt: skip


def peft(quick: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, target_parameters=STACKS)
    return get_peft_model(base(quick), config)  # type: ignore[arg-type]


def step_of(name: str, quick: bool) -> tuple[nn.Module, Callable[[], torch.Tensor], Callable]:
    """(model, its loss, a training step)."""
    model = (ours if name == "ours" else peft)(quick).train()
    ids = torch.randint(
        0, 1024, (4, 16 if quick else 128), generator=torch.Generator().manual_seed(1)
    )

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


def times(quick: bool) -> dict[str, Any]:
    """Milliseconds of the processor for a step, and the ratio to PEFT's."""
    steps = {name: step_of(name, quick)[2] for name in NAMES}
    rounds, seconds = (3, 1.0) if quick else (9, 60.0)
    found = side_by_side(steps, rounds, seconds=seconds, clock=processor)
    return {"ms": found.medians(), "of_peft": found.ratio("ours", to="PEFT")}


def main() -> None:
    torch.set_num_threads(2)
    if answer(memory, times):
        return
    quick = is_quick(__doc__)
    step = times(True) if quick else in_fresh_process(times, False)
    of: dict[str, Any] = {
        n: memory(n, True) if quick else in_fresh_process(memory, n, False) for n in NAMES
    }
    figures = {"step": step, "memory": of}
    if not quick:
        save("routed_bases", figures)
    rows = [
        (n, f"{step['ms'][n]:.0f} ms", f"{of[n]['peak']:.1f} MB", f"{of[n]['kept']:.1f} MB",
         f"{of[n]['trained']:.2f} M") for n in NAMES
    ]  # fmt: skip
    rows.append((
        "ours / PEFT", f"{step['of_peft']:.2f}",
        *(f"{of['ours'][k] / (of['PEFT'][k] or 1):.2f}" for k in ("peak", "kept")), "",
    ))  # fmt: skip
    columns = ["", "a training step", "peak of a step", "kept for backward", "trained"]
    finish("routed_bases", columns, rows, **figures)


if __name__ == "__main__":
    main()
