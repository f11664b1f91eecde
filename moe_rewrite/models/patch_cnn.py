"""The two-layer patch network of pMoE (arXiv 2306.04073, section 4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchCNN(nn.Module):
    """f(x) = sum over filters r of a_r times the mean over patches j of relu(<w_r, x_j>).

    Only the filters are trained: the output weights a_r are +1 and -1 in turn. `split=0` puts the
    cut before the filters, so that a router reads the image itself.
    """

    output: torch.Tensor

    def __init__(self, filters: int = 40, patch: int = 28, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, patch, patch, bias=False)
        self.register_buffer("output", torch.ones(filters))
        self.output[1::2] = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, channels, height, width) -> (batch,) logits of the positive class."""
        return F.relu(self.conv(x)).mean((2, 3)) @ self.output
