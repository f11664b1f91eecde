"""The call that adds LoRA experts to a product with a stacked weight of a model's own experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...analysis.stacked_products import RANK


@dataclass(frozen=True)
class StackedLoRACall:
    """The target of a node: call(out, x, scales, a, b, index, take) -> out + the experts' part.

    given, inside, outside, group, made: letters of an einsum, see `analysis.stacked_products`.
    rows: letters of the row dimensions of `scales`.

    x: the values that the model's own product reads.
    scales: (rows, R) gates times alpha / rank of the plan's rows, or (B, S, R).
    a, b: (R, I, G) and (O, R, G): each of the model's own experts has factors of its own.
    index: into G, where the product reads a matrix for each row; else None.
    take: an index into the rows of `scales` where x has these rows, or how often it has each;
        else None.
    """

    given: str
    inside: str
    outside: str
    group: str
    made: str
    rows: str

    __module__, __qualname__, __name__ = __name__, "StackedLoRACall", "stacked_lora_call"

    def __deepcopy__(self, memo: dict) -> StackedLoRACall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, index: torch.Tensor | None, take: torch.Tensor | int | None,
    ) -> torch.Tensor:  # fmt: skip
        if a.shape[0] == 0:  # a product of no columns is an error
            return out
        if index is not None:
            a, b = a[:, :, index], b[:, :, index]
        low = "".join(dict.fromkeys(self.given + self.group)).replace(self.inside, "")
        down = f"{self.given},{RANK}{self.inside}{self.group}->{low}{RANK}"
        up = f"{low}{RANK},{self.outside}{RANK}{self.group}->{self.made}"
        if take is not None:
            scales = scales.repeat_interleave(take, 0) if isinstance(take, int) else scales[take]
        return out + torch.einsum(up, torch.einsum(down, x, a) * self._laid(scales, low), b)

    def _laid(self, scales: torch.Tensor, low: str) -> torch.Tensor:
        """The gates, shaped to broadcast over the dimensions `low` and the rank."""
        order = sorted(range(len(self.rows)), key=lambda i: low.index(self.rows[i]))
        scales = scales.permute(*order, scales.ndim - 1)
        for at, letter in enumerate(low):
            if letter not in self.rows:
                scales = scales.unsqueeze(at)
        return scales
