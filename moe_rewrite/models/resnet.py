"""CIFAR ResNets, plain and wide (He et al. 2015, section 4.2; Zagoruyko & Komodakis 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two convolutions; the shortcut drops pixels and pads channels (option A)."""

    def __init__(self, inside: int, out: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, kernel, 1, kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.padding = stride, out - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            low = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride],
                      (0, 0, 0, 0, low, self.padding - low))  # fmt: skip
        return F.relu(x + y)


class ResNet(nn.Module):
    """depth = 6n + 2 layers in three stages of width 16, 32, 64 times `widen`.

    last_kernel: 3, or 1 for a last stage of pointwise convolutions (pMoE, arXiv 2306.04073).
    """

    def __init__(
        self, depth: int = 20, widen: int = 1, classes: int = 10, last_kernel: int = 3
    ) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2, kernel=last_kernel)
        self.linear = nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 3, height, width) -> (batch, classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(inside: int, out: int, blocks: int, stride: int, kernel: int = 3) -> nn.Sequential:
    rest = [BasicBlock(out, out, 1, kernel) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inside, out, stride, kernel), *rest)
