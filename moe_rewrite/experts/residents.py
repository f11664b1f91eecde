"""Experts whose weights lie off the device: the copies there of those that calls used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..utils.sharded import is_sharded, is_traced

HOST = torch.device("cpu")


class Residents:
    """The copies of one site, least recently used first.

    keep: of how many experts.
    device: where they are, that of the dense weights.
    mapped: (address, version then) of each weight that was mapped from a file.
    """

    def __init__(self, keep: int, device: torch.device) -> None:
        self.keep, self.device = keep, device
        self.mapped: Any = WeakIdKeyDictionary()
        self._kept: OrderedDict[int, dict[str, tuple[tuple, torch.Tensor]]] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Residents:
        """Without copies; those of weights in a file lie in memory."""
        return Residents(self.keep, self.device)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def held(self) -> int:
        """Bytes of the copies."""
        with self._lock:
            kept = [copy for parts in self._kept.values() for _, copy in parts.values()]
        return sum(copy.nbytes for copy in kept)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def serves(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor lies off the device, and what changes it counts its versions."""
        plain = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return plain and not (tensor.is_inference() or is_traced(tensor) or is_sharded(tensor))

    def of(self, part: str, expert: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The copy of an expert's tensor in this dtype; made where there is none, or where the
        tensor has changed. Another expert's copies go if there are too many.

        Each stream of a device has copies of its own, so that none waits for another's.
        """
        key = tensor._version, tensor.data_ptr(), dtype, self._stream()
        with self._lock:
            parts = self._kept.pop(expert, {})
            self._kept[expert] = parts  # the latest now
            kept = parts.get(part)
            if kept is None or kept[0][0] is not tensor or kept[0][1:] != key:
                parts.pop(part, None)
                while len(self._kept) > self.keep:
                    self._kept.popitem(last=False)
                kept = parts[part] = (tensor, *key), self._copied(tensor, dtype)
        return kept[1]

    def _stream(self) -> Any:
        if self.device.type in ("cpu", "meta"):
            return None
        return torch.get_device_module(self.device).current_stream(self.device)

    def _copied(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():  # it may serve training later
            waits = not tensor.is_pinned()
            return tensor.detach().to(self.device, copy=True, non_blocking=not waits).to(dtype)

    # -- where the weights lie --------------------------------------------------------------------

    @torch.no_grad()
    def settle(self, weight: nn.Parameter) -> None:
        """Have a trained weight lie on the device, and another beside it: in memory that the device
        copies from at full speed, unless a file holds it."""
        if is_sharded(weight) or not weight.numel():
            return
        filed = self.in_file(weight)
        if weight.requires_grad:
            if filed or weight.device != self.device:
                weight.data = weight.detach().to(self.device, copy=True)
        elif not filed:
            weight.data = beside(weight.detach(), self.device)

    def map(self, weight: nn.Parameter, mapped: torch.Tensor) -> None:
        """Have a weight lie in a mapped file, which holds the same values."""
        weight.data = mapped
        self.mapped[weight] = mapped.data_ptr(), _version(weight)

    def in_file(self, weight: nn.Parameter) -> bool:
        """Whether a file holds it: one that was written to since it was mapped lies in memory."""
        return self.mapped.get(weight) == (weight.data_ptr(), _version(weight))

    def following(
        self, fn: Callable[[torch.Tensor], torch.Tensor], weights: Iterable[nn.Parameter]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A move or cast of the model by `fn` for its tensors: these weights are cast, not moved."""
        before, away = self.device, {id(weight) for weight in weights}
        self.device = fn(torch.empty(0, device=before)).device

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in away:
                return fn(tensor)
            there = fn(torch.empty(0, dtype=tensor.dtype, device=before))
            return fn(tensor) if there.device == tensor.device else tensor.to(there.dtype)

        return moved


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def beside(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in the host's memory, pinned for a GPU."""
    there = tensor.to(HOST)
    return there.pin_memory() if device.type == "cuda" and not there.is_pinned() else there
