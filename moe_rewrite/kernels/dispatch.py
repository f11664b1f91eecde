"""Where a kernel runs: Triton on a CUDA tensor, or anywhere under Triton's interpreter."""

from __future__ import annotations

import os

import torch


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an op takes its Triton path for this tensor; fp64 always takes the plain one."""
    if x.dtype == torch.float64:
        return False
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
