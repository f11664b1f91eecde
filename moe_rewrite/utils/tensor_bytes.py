"""The bytes of a tensor."""

from __future__ import annotations

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order; no copy for a contiguous tensor on the CPU."""
    plain = tensor.detach().as_subclass(torch.Tensor)  # type: ignore[arg-type]
    flat = plain.cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]
