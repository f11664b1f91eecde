"""Where a GPU benchmark runs: on the GPU or, to test the script, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .timing import cuda, side_by_side, wall


class Place(NamedTuple):
    device: str
    dtype: torch.dtype
    rounds: int

    def randn(self, *size: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        made = torch.randn(*size, device=self.device, dtype=self.dtype) * scale
        return made.requires_grad_(grad)

    def milliseconds(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median of each, after one round that is not counted."""
        clock = cuda if self.device == "cuda" else wall
        return side_by_side(runs, self.rounds, warm=1, clock=clock).medians()


def there(rounds: int) -> Place:
    """The GPU in bf16; without one Triton's interpreter, which is switched on by this."""
    if torch.cuda.is_available():
        return Place("cuda", torch.bfloat16, rounds)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    return Place("cpu", torch.float32, 1)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter on the CPU"
