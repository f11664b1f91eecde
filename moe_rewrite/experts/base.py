"""The parameters of experts: the interface of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..utils.sharded import gathered, gathered_to_run, is_traced
from .residents import Residents

SEPARATOR = "/"  # replaces dots in state-dict names, which torch allows in no module name


class ExpertParameters(nn.Module):
    """The experts of one site.

    site: where they work.
    parts: names of an expert's tensors; a graph takes one input a part, for all active experts.
    whole: of these, the ones that are one tensor, whichever experts are on.
    replaced: state-dict names of the dense weights that experts replace.
    of_all: it takes the experts that are on, also those that no row of a call goes to.
    as_adapter: an expert can be written as an adapter in PEFT's format.
    dtype: of the parameters; None: float32, or what the dense tensors have if that is wider. In
        16 bits a small step of an optimizer changes nothing.
    offloads: experts' weights can lie off the device until a call uses them.
    residents: the copies there of those that do; None: all weights lie on the device.
    quantized: the dtype of matrices in low precision, ``"int8"`` or ``"bfloat16"``, for inference;
        None: experts that can be trained.
    computes: for each part, the dtype in which a graph takes it, that of the dense tensors; empty
        for kinds whose parameters have this dtype themselves.
    """

    site: Any
    parts: tuple[str, ...]
    whole: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    of_all = False
    as_adapter = False
    offloads = False
    residents: Residents | None = None
    dtype: torch.dtype | None = None
    quantized: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.computes: dict[str, torch.dtype] = {}
        self._cast: dict[tuple[str, int], tuple[tuple, torch.Tensor]] = {}

    def dtype_for(self, dense: torch.dtype) -> torch.dtype:
        """The dtype of parameters beside dense tensors of this dtype."""
        if not dense.is_floating_point:
            return dense
        return self.dtype or torch.promote_types(dense, torch.float32)

    def in_graph(self, part: str, expert: int, tensor: torch.Tensor) -> torch.Tensor:
        """An expert's tensor of a part in the dtype that a graph takes; the cast of one that gets no
        gradient is kept until it changes; none of one that is trained in training mode, where
        optimizers write through `.data`, which no version counts."""
        dtype = self.computes.get(part, tensor.dtype)
        if self.residents is not None:
            if self.residents.serves(tensor):
                return self.residents.of(part, expert, tensor, dtype)
            tensor = tensor.to(self.residents.device)
        if tensor.dtype == dtype:
            return gathered_to_run(tensor)
        trained = tensor.requires_grad and (self.training or torch.is_grad_enabled())
        if is_traced(tensor) or trained or tensor.is_inference():  # which counts no versions
            return gathered_to_run(tensor).to(dtype)
        key = (tensor, tensor._version, tensor.data_ptr(), dtype)
        kept = self._cast.get((part, expert))
        if kept is None or kept[0][0] is not tensor or kept[0][1:] != key[1:]:
            kept = self._cast[part, expert] = key, gathered(tensor.detach()).to(dtype)
        return kept[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but keep parameters in a dtype of their own, and those that lie off
        the device where they are."""
        if self.residents is not None:
            fn = self.residents.following(fn, self.weights(trained=False))
        if not self.computes:
            return super()._apply(fn, recurse)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or not isinstance(tensor, nn.Parameter):
                return moved
            dtype = self.dtype_for(moved.dtype)
            return moved if moved.dtype == dtype else tensor.to(moved.device, dtype)

        super()._apply(keep_dtype, recurse)
        self.forget()
        self.settle()
        return self

    def follow(self, fn: Any) -> None:
        """Compute in the dtype that the dense tensors have after a move or cast of the model by
        `fn`; one of the experts alone changes nothing in the graph."""
        self.computes = {p: fn(torch.empty(0, dtype=d)).dtype for p, d in self.computes.items()}
        self.forget()

    def add(self, dense: dict[str, torch.Tensor]) -> list[nn.Parameter]:
        """Add an expert and return its new parameters.

        dense: the site's frozen tensors by state-dict name.
        """
        raise NotImplementedError

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Set which experts are trained; the others are frozen, and their gradients dropped."""
        for of_part in self.parameter_lists() if not self.quantized else ():
            for p, on in zip(of_part, trained, strict=True):
                p.requires_grad_(on and p.numel() > 0)  # DDP waits for every gradient
                if not on:
                    p.grad = None
        self.settle()

    def offload(self, keep: int, device: torch.device, saved: dict[int, torch.Tensor]) -> None:
        """Have the weights of experts that are not trained lie off the device; copies of `keep` of
        them, those used last, stay there. saved: by id, mapped tensors that hold the same values; a
        weight that lies in a file stays there without."""
        mapped = {} if self.residents is None else self.residents.mapped
        self.residents = Residents(keep, device)
        self.residents.mapped.update(mapped)
        for p in self.weights(trained=False):
            if id(p) in saved:
                self.residents.map(p, saved[id(p)])
        self.forget()
        self.settle()

    def bring_back(self) -> None:
        """Have all weights lie on the device."""
        if self.residents is None:
            return
        for p in self.weights(trained=False):
            mapped = p in self.residents.mapped
            p.data = p.detach().to(self.residents.device, copy=mapped)
        self.residents = None
        self.forget()

    def settle(self) -> None:
        """After experts came, or are trained or frozen from now on: have each lie where it belongs."""
        if self.residents is not None:
            for p in self.weights():
                self.residents.settle(p)

    def weights(self, trained: bool | None = None) -> list[nn.Parameter]:
        """Of all experts; of those that are trained, or are not."""
        every = [p for of_part in self.parameter_lists() for p in of_part]
        return [p for p in every if trained in (None, p.requires_grad)]

    def train_shared(self, on: bool) -> None:
        """Set whether what all experts share is trained, where a kind has that."""

    def parameter_lists(self) -> list[list[nn.Parameter]]:
        """For each part that holds parameters, the list of the experts' parameters."""
        raise NotImplementedError

    def remove(self, index: int) -> None:
        """Remove any expert. Kinds that can only remove the last one raise ConfigError."""
        raise ConfigError(
            f"{type(self).__name__}: experts of this kind are removed from the newest on, by "
            "remove_last()"
        )

    def remove_last(self) -> None:
        raise NotImplementedError

    def merged(
        self, expert: int, dense: dict[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        """State-dict name -> the dense tensor with an expert merged in at gate 1, in the expert's
        dtype. scale: of LoRA experts. Raises ConfigError where one dense tensor cannot do that."""
        raise ConfigError(f"{self.site.name}: experts of this kind cannot be merged")

    def join(self, experts: Sequence[int], weights: Sequence[float]) -> float | None:
        """Make the first of these experts the nearest one to their weighted mean. Returns the norm of
        the difference by that of the mean; None for sites at which the experts have nothing.
        Raises ConfigError where experts of this kind have no mean."""
        raise ConfigError(f"{self.site.name}: experts of this kind cannot be joined")

    def stacked(self, active: Sequence[int]) -> tuple[Any, ...]:
        """The graph's input for each part, for these active experts: whole tensors, whatever the
        parameters are (`in_graph` gathers them)."""
        raise NotImplementedError

    def expert_dim(self, part: str) -> tuple[int, int] | None:
        """(dimension along which a part's experts are stacked, elements of each expert along it);
        None if the part is a list of tensors."""
        return None

    def stacked_apart(self, active: Sequence[int]) -> tuple[torch.Tensor, ...] | None:
        """One tensor (E, ...) a part, if all experts have one shape and the site's call accepts
        stacks; else None."""
        return None

    def named(
        self, part: str, stack: Any, active: Sequence[int]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """A part's value from `stacked` with names instead of tensors, and the tensors by name."""
        if isinstance(stack, torch.Tensor):
            return part, {part: stack.detach()}
        names = [f"{part}.{expert}" for expert in active]
        return names, dict(zip(names, (t.detach() for t in stack), strict=True))

    def forget(self) -> None:
        """Drop cached stacks, casts and copies."""
        self._cast.clear()
        if self.residents is not None:
            self.residents.clear()
