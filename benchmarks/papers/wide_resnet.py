"""The wide ResNet of pMoE's CIFAR experiments, as its official code has it: dense and with experts."""

# The last of three stages is a residual one in the dense network. In the network with experts it is a
# 3x3 convolution, dense, and a pointwise one that the experts share out: they read its whole input
# and compute a slice of its output each. `gates_first` is that in plain PyTorch, since `convert` lays
# gates over what an expert puts out.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-3  # of batch norm, as in Keras


class Stage(nn.Module):
    """A residual block with norms and activations before its convolutions."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.before = activated(inside)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1)
        self.between = activated(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = nn.Conv2d(inside, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.between(self.conv1(self.before(x)))) + self.shortcut(x)


def activated(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, eps=EPS), nn.ReLU())


class WideResNet(nn.Module):
    """One block a stage, of width 16, 32, 64 times `widen`, on 32 x 32 images.

    residual: the last stage is a residual block; or a 3x3 convolution and a pointwise one.
    """

    def __init__(self, widen: int, residual: bool = True, classes: int = 10) -> None:
        super().__init__()
        a, b, c = (widen * n for n in (16, 32, 64))
        last: list[nn.Module] = [Stage(b, c, 2)]
        if not residual:
            last = [nn.Sequential(activated(b), nn.Conv2d(b, c, 3, 2, 1)), pointwise(c, c)]
        self.stages = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), Stage(16, a, 1), Stage(a, b, 2), *last
        )
        self.after = activated(c)
        self.linear = nn.Linear(c, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 3, 32, 32) -> (batch, classes) logits."""
        return self.linear(self.after(self.stages(x)).mean((2, 3)))


def pointwise(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inside, eps=EPS), nn.ReLU(), nn.Conv2d(inside, out, 1))


class GatesFirst(nn.Module):
    """Experts that take `taken` positions of a map each; the gates (softmax over all positions, not
    rescaled) multiply what goes into an expert's batch norm, positions not taken are zeros there."""

    def __init__(self, channels: int, experts: int, taken: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(experts, channels) * 1e-4)
        self.experts = nn.ModuleList(
            pointwise(channels, channels // experts) for _ in range(experts)
        )
        self.taken = taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.conv2d(x, self.rows[:, :, None, None]).flatten(2)
        chosen = torch.zeros_like(scores).scatter(2, scores.topk(self.taken).indices, 1.0)
        gates = (scores.softmax(2) * chosen).unflatten(2, x.shape[2:])
        parts = [e(x * gates[:, i, None]) for i, e in enumerate(self.experts)]
        return torch.cat(parts, 1)


def gates_first(widen: int, experts: int, taken: int) -> WideResNet:
    model = WideResNet(widen, residual=False)
    model.stages[-1] = GatesFirst(64 * widen, experts, taken)
    return model
