"""LoRA experts on a linear map, on a GPU."""

# python -m benchmarks.speed.gpu_lora [--quick]: bf16, medians of warm calls, all forms side by side:
# the frozen map alone, it with experts of which the newest is trained, the gradient of x as two
# products and as one with the low-rank part in its epilogue, and PEFT's layer with as many adapters
# added up. Without a GPU the kernel runs in Triton's interpreter at a tiny size: that shows that the
# script runs to its end, its times say nothing.

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from moe_rewrite.kernels.lora import stacked
from moe_rewrite.kernels.lora.op import lora_linear

from ..tools.device import Place, device_name, there
from ..tools.models import with_backward
from ..tools.report import finish, is_quick, save

Step = Callable[[], Any]

SHAPES = [  # tokens, width, experts, rank
    (32768, 4096, 8, 16), (32768, 4096, 4, 8), (32768, 4096, 16, 32), (32768, 1024, 8, 16),
    (8192, 4096, 8, 16), (4096, 4096, 8, 16), (512, 4096, 8, 16), (8192, 1024, 8, 16),
]  # fmt: skip
TINY = [(20, 16, 4, 4)]
BACKWARDS = {"two products": False, "one product": True}


def measured(
    place: Place, tokens: int, width: int, experts: int, rank: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of each form: forward alone, and forward with backward."""
    torch.manual_seed(0)
    x, direction = place.randn(tokens, width), place.randn(tokens, width, grad=False)
    weight = place.randn(width, width, scale=width**-0.5, grad=False)
    low = experts * rank
    gates = torch.rand(tokens, experts, device=place.device, dtype=place.dtype)
    scales = gates.repeat_interleave(rank, 1).requires_grad_()
    old = place.randn(low - rank, width, grad=False), place.randn(width, low - rank, grad=False)
    new = place.randn(rank, width), place.randn(width, rank)
    a, b = ([o, n] for o, n in zip(old, new, strict=True))
    leaves = [x, scales, *new]

    def ours() -> torch.Tensor:
        return lora_linear(x, weight, None, scales, a, b)

    forms: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        "base": (lambda: F.linear(x, weight), [x]), "ours": (ours, leaves),
    }  # fmt: skip
    if find_spec("peft") is not None:
        layer = _peft(weight, experts, rank)
        forms["PEFT"] = (lambda: layer(x), [x, *layer.parameters()])
    with torch.no_grad():
        forward = place.milliseconds({name: run for name, (run, _) in forms.items()})
    steps = {name: with_backward(run, direction, given) for name, (run, given) in forms.items()}
    for name, fused in BACKWARDS.items():
        steps[name] = _forced(with_backward(ours, direction, leaves), fused)
    both = place.milliseconds(steps)
    found = {name: {"both": ms} for name, ms in both.items()}
    for name, ms in forward.items():
        found[name]["forward"] = ms
    return found


def _forced(step: Step, fused: bool) -> Step:
    def run() -> None:
        with patch.object(stacked, "fuses", lambda *_: fused):
            step()

    return run


def _peft(weight: torch.Tensor, experts: int, rank: int) -> torch.nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(
        *weight.shape[::-1], bias=False, device=weight.device, dtype=weight.dtype
    )
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank)
    layer = Linear(base, "0", config, r=rank, lora_alpha=rank).to(weight.device, weight.dtype)
    for e in range(1, experts):
        layer.update_layer(str(e), r=rank, lora_alpha=rank, config=config)
    layer.to(weight.device, weight.dtype)
    layer.set_adapter([str(e) for e in range(experts)])
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith(f".{experts - 1}.weight"))
    return layer


def main() -> None:
    quick = is_quick(__doc__)
    gpu, place = torch.cuda.is_available(), there(10 if quick else 40)
    shapes = (SHAPES[:1] if quick else SHAPES) if gpu else TINY
    cells = {}
    for shape in shapes:
        name = "T{} d{} E{} r{}".format(*shape)
        cells[name] = measured(place, *shape)
        print(f"{name}: {cells[name]}", file=sys.stderr, flush=True)
    figures = {"device": device_name(), "triton": version("triton"), "ms": cells}
    if gpu and not quick:
        save("gpu_lora", figures)
    rows = [
        (
            name,
            form,
            *(f"{ms[k] / forms['base'][k]:.2f}" if k in ms else "" for k in ("forward", "both")),
        )
        for name, forms in cells.items()
        for form, ms in forms.items()
    ]
    finish(
        "gpu_lora", ["linear map", "form", "forward/base", "with backward/base"], rows, **figures
    )


if __name__ == "__main__":
    main()
