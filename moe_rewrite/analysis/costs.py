"""Sizes and FLOPs of nodes, at the example's sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..program import op_name, value


def hint(size: Any) -> int:
    """A size at the example's values."""
    return size if isinstance(size, int) else int(size.node.hint)


def numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(s) for s in tensor.shape)


def flops(node: fx.Node) -> int:
    """Two per multiply-add of the products in a node; other operations count as nothing."""
    if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
        return 0
    name, out = op_name(node), numel(value(node))
    operands = [value(n) for n in node.args if isinstance(n, fx.Node)]
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2 * out * hint(operands[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2 * out * hint(operands[1].shape[-1])
    if name in ("conv1d", "conv2d", "conv3d", "convolution"):
        return 2 * out * math.prod(hint(s) for s in operands[1].shape[1:])
    if name == "scaled_dot_product_attention":
        return 2 * hint(operands[1].shape[-2]) * (numel(operands[0]) + out)
    return 0
