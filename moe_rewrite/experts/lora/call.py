"""The call that replaces a linear map with LoRA experts if the router keeps few experts a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...kernels import cost_model
from ...kernels.cost_model import Execution
from ...kernels.lora.grouped import lora_grouped
from ...kernels.lora.op import Stack, lora_linear_unchecked
from ...routing.dispatch import RowGates


class LoRACall:
    """The target of a lowered node: call(x, weight, bias, scales, gates, a, b).

    scales: gates as `lora_linear` takes them.
    gates: RowGates of the active experts, or None without any.
    form: the execution; None chooses the cheaper one for each call's rows and experts.
    """

    __module__, __qualname__, __name__ = __name__, "LoRACall", "lora_call"

    def __init__(self, scale: float, form: Execution | None) -> None:
        """scale: LoRA's alpha / rank."""
        self.scale, self.form = scale, form

    def __deepcopy__(self, memo: dict) -> LoRACall:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRACall) and (self.scale, self.form) == (other.scale, other.form)

    def __hash__(self) -> int:
        return hash((self.scale, self.form))

    @property
    def trace_key(self) -> Any:
        """Key of the trace for export: equal for all calls, since export uses the dense form."""
        return LoRACall

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        scales: torch.Tensor, gates: RowGates | None, a: Stack, b: Stack,
    ) -> torch.Tensor:  # fmt: skip
        form = self._form(x, weight, scales, gates)
        if form == "dense" or gates is None:
            return lora_linear_unchecked(x, weight, bias, scales, a, b)
        rank = scales.shape[-1] // gates.gates.shape[-1]
        gates_TE, dispatch = gates.over(tuple(x.shape[:-1]))
        gates_TK = gates_TE.gather(1, dispatch.experts_TK.clamp_min(0)) * self.scale
        return lora_grouped(x, weight, bias, gates_TK.to(x.dtype), dispatch.plan, a, b, rank)

    def _form(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, gates: RowGates | None
    ) -> Execution:
        if gates is None or gates.top_k is None or torch.compiler.is_exporting():
            return "dense"
        experts = gates.gates.shape[-1]
        if gates.top_k >= experts or x.device.type != "cpu":  # grouped runs on the CPU only
            return "dense"
        if self.form is not None:
            return self.form
        if torch.compiler.is_compiling():  # costs are known of eager operations, call by call
            return "dense"
        rows, rank = max(x.shape[:-1].numel(), 1), scales.shape[-1] // experts
        out, width = weight.shape
        return cost_model.best(
            cost_model.lora(cost_model.CPU, rows, width, out, experts, rank, gates.top_k)
        )
