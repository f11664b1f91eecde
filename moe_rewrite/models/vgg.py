"""A CIFAR VGG with batch norm (Simonyan & Zisserman 2014)."""

from __future__ import annotations

import torch
from torch import nn

PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool")  # VGG-9


class VGG(nn.Module):
    """scale: divides every width, for small tests."""

    def __init__(self, plan: tuple = PLAN, classes: int = 10, scale: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for step in plan:
            if step == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            out = step // scale
            layers += [
                nn.Conv2d(inside, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            ]  # fmt: skip
            inside = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inside, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 3, height, width) -> (batch, classes) logits."""
        return self.classifier(self.features(x).mean((2, 3)))
