"""A CIFAR DenseNet (Huang et al. 2016): every layer reads all that came before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), nn.Conv2d(inside, growth, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Halves channels and pixels."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), nn.Conv2d(inside, inside // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, layers: int = 4, growth: int = 12, classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        parts: list[nn.Module] = []
        for stage in range(3):
            for _ in range(layers):
                parts.append(DenseLayer(width, growth))
                width += growth
            if stage < 2:
                parts.append(Transition(width))
                width //= 2
        self.layers = nn.Sequential(*parts)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 3, height, width) -> (batch, classes) logits."""
        x = F.relu(self.norm(self.layers(self.stem(x))))
        return self.head(x.mean((2, 3)))
