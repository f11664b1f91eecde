"""The calls that add LoRA experts to a product with the weights of a model's own experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...kernels.grouped_product import grouped_product, in_eager
from ...kernels.lora.sorted_rows import lora_sorted


@dataclass(frozen=True)
class GroupedLoRACall:
    """The target of a node: call(out, x, scales, a, b, index, ends) -> out + the experts' part.

    product: the operator of the model's own product, (rows, weights (G, I, O), ends) -> rows.
    x: (T, I), the rows `index` of the plan's rows, sorted into G groups that end at `ends`.
    scales: (rows, R) gates times alpha / rank of the plan's rows.
    a, b: (R, I, G) and (O, R, G): each group has factors of its own.
    """

    product: Any

    __module__, __qualname__, __name__ = __name__, "GroupedLoRACall", "grouped_lora_call"

    def __deepcopy__(self, memo: dict) -> GroupedLoRACall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, index: torch.Tensor, ends: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        return _added(_running(self.product), out, x, scales[index], a, b, ends)


@dataclass(frozen=True)
class SortedLoRACall:
    """The same with the model's own product: call(x, weights, scales, a, b, index, ends)."""

    product: Any

    __module__, __qualname__, __name__ = __name__, "SortedLoRACall", "sorted_lora_call"

    def __deepcopy__(self, memo: dict) -> SortedLoRACall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, index: torch.Tensor, ends: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        product = _running(self.product)
        if product is grouped_product and a.shape[0] and not x.is_meta:
            return lora_sorted(x, weights, scales[index], a, b, ends)
        return _added(product, product(x, weights, ends), x, scales[index], a, b, ends)


def _added(
    product: Any, out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, ends: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """out and the experts' part of each row. scales: of the rows."""
    if a.shape[0] == 0:  # a product of no columns is an error
        return out
    low = product(x, a.permute(2, 1, 0).contiguous(), ends) * scales
    return out + product(low, b.permute(2, 1, 0).contiguous(), ends)


def _running(product: Any) -> Any:
    """What computes the product: in a trace the operator itself."""
    return product if torch.compiler.is_compiling() else in_eager(product)
