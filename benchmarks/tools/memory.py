"""Memory in MB (1e6 bytes): of this process, read from Linux's /proc, and of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_rewrite.utils.quantized import is_quantized


def memory_now() -> float:
    return _field("VmRSS")


def peak_memory() -> float:
    """The peak since the start of the process, or since `forget_peak`."""
    return _field("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: Callable[[], Any]) -> tuple[Any, float]:
    """(its result, the peak above the memory in use before)."""
    forget_peak()
    before = memory_now()
    given = run()
    return given, peak_memory() - before


def kept_for_backward(run: Callable[[], Any], parameter: Callable[[torch.Tensor], bool]) -> float:
    """MB of distinct storages that autograd keeps of a forward pass. parameter: says of a tensor
    that it is one, which is left out."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not parameter(tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        given = run()
    del given
    return sum(found.values()) / 1e6


def kept_beside(model: nn.Module, run: Callable[[], Any]) -> float:
    """MB that autograd keeps of a forward pass, parameters and quantised weights left out."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters() if type(t) is nn.Parameter}
    return kept_for_backward(
        run, lambda t: is_quantized(t) or t.untyped_storage().data_ptr() in {0, *own}
    )


def _field(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6
