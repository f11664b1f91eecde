"""LoRA experts in plain PyTorch: the reference that every kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

Stack = torch.Tensor | Sequence[torch.Tensor]
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the number of axes
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def add_lora_experts(
    out_TO: torch.Tensor,
    x_TD: torch.Tensor,
    scales_TR: torch.Tensor,
    a_RD: Stack,
    b_OR: Stack,
) -> torch.Tensor:
    """``out + ((x A^T) * scales) B^T``: all experts stacked into one low-rank product (LoRA, arXiv
    2106.09685, section 4.1, summed over experts with their gates).

    T rows (any leading dimensions), D input width, O output width, R = experts * rank.
    scales_TR: each expert's gate times alpha / rank, repeated over its rank.
    a_RD, b_OR: may be lists, to be stacked over R. All of one dtype.
    """
    a = a_RD if isinstance(a_RD, torch.Tensor) else torch.cat(list(a_RD))
    b = b_OR if isinstance(b_OR, torch.Tensor) else torch.cat(list(b_OR), dim=1)
    # contiguous: with other strides, PyTorch's sums depend on whether the weight requires a gradient
    return out_TO + F.linear(F.linear(x_TD.contiguous(), a) * scales_TR, b)


def add_conv_lora_experts(
    out: torch.Tensor,
    x: torch.Tensor,
    scales: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    output_padding: list[int] | None = None,
) -> torch.Tensor:
    """The same for a convolution over a line, a map or a volume: A has its kernel size and R output
    channels, B is pointwise.

    out, x: (B, O, ...) and (B, C, ...), a position along each axis.
    scales: (B, R, ...) over the output's positions, or of size 1 along each axis for one gate a
        sample.
    a, b: (R, C, *kernel) and (O, R, 1, ...).
    output_padding: of a transposed convolution; None for a plain one.
    """
    if a.shape[0] == 0:  # a convolution to no channels is an error
        return out
    axes = x.ndim - 2
    plain: Any = PLAIN[axes]
    if output_padding is None:
        low = plain(x, a, None, stride, padding, dilation)
    else:
        scatter: Any = TRANSPOSED[axes]
        low = scatter(
            x, a.transpose(0, 1), None, stride, padding, output_padding, dilation=dilation
        )
    return out + plain(low * scales, b)


def lora_linear(
    x_TD: torch.Tensor,
    weight_OD: torch.Tensor,
    bias_O: torch.Tensor | None,
    scales_TR: torch.Tensor,
    a_RD: Stack,
    b_OR: Stack,
) -> torch.Tensor:
    """``x W^T + bias + ((x A^T) * scales) B^T``."""
    out_TO = F.linear(x_TD, weight_OD, bias_O)
    return add_lora_experts(out_TO, x_TD, scales_TR, a_RD, b_OR)
