"""The call that adds LoRA experts to a product with the weights of a model's own experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...kernels.grouped_product import in_eager


class GroupedLoRACall:
    """The target of a node: call(out, x, scales, a, b, index, ends) -> out + the experts' part.

    product: the operator of the model's own product, (rows, weights (G, I, O), ends) -> rows.
    x: (T, I), the rows `index` of the plan's rows, sorted into G groups that end at `ends`.
    scales: (rows, R) gates times alpha / rank of the plan's rows.
    a, b: (R, I, G) and (O, R, G): each group has factors of its own.
    """

    __module__, __qualname__, __name__ = __name__, "GroupedLoRACall", "grouped_lora_call"

    def __init__(self, product: Any) -> None:
        self.product = product

    def __deepcopy__(self, memo: dict) -> GroupedLoRACall:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupedLoRACall) and self.product is other.product

    def __hash__(self) -> int:
        return hash(self.product)

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, index: torch.Tensor, ends: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if a.shape[0] == 0:  # a product of no columns is an error
            return out
        product = self.product if torch.compiler.is_compiling() else in_eager(self.product)
        low = product(x, a.permute(2, 1, 0).contiguous(), ends) * scales[index]
        return out + product(low, b.permute(2, 1, 0).contiguous(), ends)
