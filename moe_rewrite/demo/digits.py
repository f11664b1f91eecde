"""Handwritten digits: a small vision transformer that knows six of them learns two and two more."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..continual.compare import compare
from ..continual.images import ImageProblem, Images, items_of, split_classes
from ..continual.registry import Setup
from ..continual.results import Result
from ..continual.tasks import Task
from ..continual.training import Training, adamw, fit
from ..errors import require_package

METHODS = ("pmoe", "replay", "full")
KNOWN = 6  # digits that the network is trained on before


class DigitNet(nn.Module):
    """A small vision transformer: 8x8 image, 2x2 patches, 16 tokens."""

    def __init__(self, width: int = 96, depth: int = 4, classes: int = KNOWN) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(DigitBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: (batch, 1, 8, 8) -> (batch, classes) logits."""
        x = self.embed(image).flatten(2).transpose(1, 2) + self.position
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


def digits(out: Path, seed: int = 0, epochs: int = 40) -> dict[str, Result]:
    """Train on digits 0 to 5, convert, learn 6-7, then 8-9; and the same by fine-tuning.

    Prints accuracies and forgetting; writes results.json, pictures and checkpoints into `out`.
    """
    torch.manual_seed(seed)
    known, stream = _tasks(seed)
    problem = ImageProblem(32, "image")
    training = Training(epochs=epochs, batch_size=32, lr=1e-3, seed=seed)
    dense = DigitNet()
    fit(
        "dense network", problem, [(0, item) for item in known.train],
        lambda batch, task_ids: problem.loss(dense, batch), [adamw(list(dense.parameters()), training)],
        training, epochs,
    )  # fmt: skip
    setup = Setup(split=2, training=training)
    return compare(METHODS, dense.eval(), problem, stream, setup, known, out=out)


def _tasks(seed: int) -> tuple[Task, list[Task]]:
    """Digits 0 to 5, and the stream of the others, from scikit-learn's 1,797 images, of which a
    quarter is for testing."""
    require_package("sklearn", "demo", "the demonstration")
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(order) * 3 // 4
    train, test = (Images(pixels[part], labels[part]) for part in (order[:cut], order[cut:]))
    same = {c: c for c in range(KNOWN)}
    known = Task("digits 0-5", items_of(train, same), items_of(test, same))
    others, unseen = _without_known(train), _without_known(test)
    return known, split_classes(others, unseen, per_task=2, first_column=KNOWN, name="digits")


def _without_known(images: Images) -> Images:
    new = images.labels >= KNOWN
    return Images(images.pixels[new], images.labels[new])
