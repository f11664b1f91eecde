"""Where the Triton kernels run, and helpers of their launches. Does not import Triton itself."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(*tensors: torch.Tensor) -> bool:
    """Whether kernels can run on these tensors: on CUDA if Triton is installed, or anywhere in
    Triton's interpreter (TRITON_INTERPRET=1); floating-point ones in fp32, bf16 or fp16."""
    if any(t.is_floating_point() and t.dtype not in DTYPES for t in tensors):
        return False
    if tensors[0].is_cuda:
        return find_spec("triton") is not None
    return tensors[0].device.type == "cpu" and interpreted()


def capability(x: torch.Tensor) -> int:
    """The major compute capability of x's device; 9 if it is no GPU."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def precision(dtype: torch.dtype) -> str:
    """The PRECISION of a product (see tl_matmul.py); for fp32, as PyTorch's setting says."""
    if dtype == torch.bfloat16 and interpreted():  # its products read bf16 as integers
        return "wide"
    wanted = torch.get_float32_matmul_precision()
    return "ieee" if dtype == torch.float32 and wanted == "highest" else "tf32"
