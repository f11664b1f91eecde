"""Products with weights in int8 or bfloat16, for inference.

int8: a scale for each output channel of the weight and one for each row of the input, products of
integers, summed exactly (LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers). So a row's
result does not depend on the rows beside it.

S rows, D and O widths of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

DTYPES = ("int8", "bfloat16")
LARGEST = 127


class LowPrecision(NamedTuple):
    """A matrix. values: (O, D), int8 or bfloat16. scale: (O,) fp32, None for bfloat16."""

    values: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, weight_OD: torch.Tensor, dtype: str) -> LowPrecision:
        weight_OD = weight_OD.detach().contiguous()
        if dtype == "bfloat16":
            return cls(weight_OD.bfloat16(), None)
        values, scale = rounded(weight_OD)
        return cls(values, scale.squeeze(1))

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that it stands for."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values * self.scale[:, None]).to(dtype)


Matrix = torch.Tensor | LowPrecision


def rounded(x_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values (S, D), fp32 scales (S, 1)) whose product is nearest to x; the largest value of a
    row is exact."""
    largest = torch.linalg.vector_norm(x_SD, float("inf"), dim=1, keepdim=True).float()
    scale = largest.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    return torch.div(x_SD, scale).round_().to(torch.int8), scale


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of rows (..., D), in x's dtype; int8 weights are multiplied in x's dtype."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    if weight.scale is None:
        y = F.linear(x.to(weight.values.dtype), weight.values).to(x.dtype)
    else:
        y = F.linear(x, weight.values.to(x.dtype)) * weight.scale.to(x.dtype)
    return y if bias is None else y + bias


def grouped_linear(
    x_SD: torch.Tensor, weights: Sequence[Matrix], biases: Sequence[torch.Tensor] | None,
    sizes: list[int],
) -> torch.Tensor:  # fmt: skip
    """(S, O) on the CPU: the rows of each group, of these sizes, through its own weight."""
    first = weights[0]
    width = (first if isinstance(first, torch.Tensor) else first.values).shape[0]
    y_SO = x_SD.new_empty(len(x_SD), width)
    integers = [_in_integers(w) for w in weights]
    made = y_SO.split_with_sizes(sizes)
    if any(integers):
        values, scale = rounded(x_SD)
        for weight, own, y in zip(weights, values.split_with_sizes(sizes), made, strict=True):
            if _in_integers(weight):
                sums = torch._int_mm(own, weight.values.t())  # type: ignore[union-attr]
                torch.mul(sums, weight.scale, out=y)  # type: ignore[union-attr, arg-type]
        y_SO.mul_(scale)
    if not all(integers):
        for weight, own, y in zip(weights, x_SD.split_with_sizes(sizes), made, strict=True):
            if not _in_integers(weight):
                y.copy_(linear(own, weight))
    for bias, y in zip(biases or (), made if biases else (), strict=True):
        y.add_(bias)
    return y_SO


def _in_integers(weight: Matrix) -> bool:
    return isinstance(weight, LowPrecision) and weight.scale is not None and sums_exactly()


@cache
def sums_exactly() -> bool:
    """Whether this processor's int8 products are exact: without VNNI instructions some add pairs of
    products in 16 bits, which the largest values exceed."""
    rows = torch.full((2, 64), LARGEST, dtype=torch.int8)
    found = torch._int_mm(rows, torch.stack([rows[0], -rows[0]]).t())
    return found.tolist() == 2 * [[64 * LARGEST**2, -64 * LARGEST**2]]
