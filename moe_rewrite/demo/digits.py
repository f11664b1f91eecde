"""Handwritten digits: a small vision transformer learns six of them, then two and two more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import LoRAExperts, TokenRouter
from ..convert import convert
from ..converted.model import MoEModel
from .comparison import Part, Step, compare, train

DIGIT_TASKS = ((0, 1, 2, 3, 4, 5), (6, 7), (8, 9))


class DigitNet(nn.Module):
    """A small vision transformer: 8x8 image, 2x2 patches, 16 tokens."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(DigitBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: (batch, 16, 4) patches -> (batch, 10) logits."""
        x = self.embed(image) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class DigitBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def digits(out: Path, seed: int = 0, epochs: int = 40) -> dict[str, Any]:
    """Train on digits 0-5, convert, teach 6-7 then 8-9; compare with plain fine-tuning.

    Prints accuracy by task and forgetting, writes digits.json and digits.png into `out`.
    """
    torch.manual_seed(seed)
    tasks = [_digit_part(c, seed) for c in DIGIT_TASKS]
    names = ["digits " + "".join(map(str, c)) for c in DIGIT_TASKS]
    dense = DigitNet()

    def cross_entropy(model: nn.Module) -> Step:
        return lambda x, y, task: F.cross_entropy(model(x), y)

    train(
        "dense network", cross_entropy(dense), list(dense.parameters()), tasks[0][0], None, epochs
    )
    dense.eval()

    def accuracy(model: nn.Module, part: Part) -> float:
        return float((model(part.x).argmax(-1) == part.y).float().mean())

    moe = _convert_digits(dense)
    return compare(
        "digits", dense, moe, names, tasks, cross_entropy, accuracy, out, epochs, lr=3e-3
    )


def _convert_digits(dense: nn.Module) -> MoEModel:
    moe = convert(
        dense, split=2, router=TokenRouter(granularity="sequence"),
        experts=LoRAExperts(rank=8, sites="all+head"), example_inputs=torch.zeros(2, 16, 4),
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def _digit_part(classes: tuple[int, ...], seed: int) -> tuple[Part, Part]:
    """(train, test) of these digits from scikit-learn's 1,797 images, a quarter for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[torch.isin(labels[order], torch.tensor(classes))]
    cut = len(chosen) * 3 // 4
    return (
        Part(patches[chosen[:cut]], labels[chosen[:cut]]),
        Part(patches[chosen[cut:]], labels[chosen[cut:]]),
    )
