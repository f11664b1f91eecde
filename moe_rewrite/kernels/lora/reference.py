"""LoRA experts in plain PyTorch: the reference that every kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Stack = torch.Tensor | Sequence[torch.Tensor]


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
    out_BOHW: torch.Tensor,
    x_BCHW: torch.Tensor,
    scales_BRHW: torch.Tensor,
    a_RChw: torch.Tensor,
    b_OR11: torch.Tensor,
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
) -> torch.Tensor:
    """The same for a convolution: A has its kernel size and R output channels, B is pointwise.

    scales_BRHW: over the output's positions, or (B, R, 1, 1) for one gate a sample.
    """
    if a_RChw.shape[0] == 0:  # a convolution to no channels is an error
        return out_BOHW
    low = F.conv2d(x_BCHW, a_RChw, None, stride, padding, dilation) * scales_BRHW
    return out_BOHW + F.conv2d(low, b_OR11)


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
