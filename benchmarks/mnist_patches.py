"""pMoE's synthetic MNIST task: one of sixteen digit patches decides the class.

``python -m benchmarks.mnist_patches [--quick]``: test accuracy by number of training images, of a
patch CNN and of the two pMoE networks that `convert` makes of it: separate training (a router
trained first on a linear loss, then frozen, hard gate, 2 experts of 20 filters, 2 patches each) and
joint training (8 experts of 5 filters, 6 patches each, softmax over those). arXiv 2306.04073,
sections 4 and 5. Each method has its best learning rate of one grid, chosen on images apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts
from moe_rewrite.models.patch_cnn import PatchCNN

from .common import arguments, curves, finish, mnist, save

CLASSES = (0, 1)  # the digits that decide: -1 and +1
GRID, PATCH, BATCH = 4, 28, 20
SIZES = (100, 300, 500, 700, 900, 1000)
RATES = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Images:
    """x: (N, 1, 112, 112); y: (N,) -1 or 1; where: (N,) the patch that decides."""

    x: torch.Tensor
    y: torch.Tensor
    where: torch.Tensor


def compose(digits: tuple[torch.Tensor, torch.Tensor], count: int, seed: int) -> Images:
    """Images of 4 x 4 digits: one of a deciding class, fifteen of neither."""
    images, labels = digits
    generator = torch.Generator().manual_seed(seed)

    def draw(results: dict[str, Any]) -> Any:
    return curves(results, {name: name for name in results}, "One patch of 16 decides")


def main() -> None:
    quick = arguments(__doc__ or "").quick
    torch.set_num_threads(1)  # small products: a second thread costs more than it gives
    sizes, seeds, epochs, tests = ((60,), 1, 3, 100) if quick else (SIZES, 5, 150, 2000)
    results = measure(sizes, seeds, epochs, tests)
    rows = [
        (m, r["lr"], *(f"{v['mean']:.3f} ± {v['spread']:.3f}" for v in r["by_size"].values()),
         r["macs"]["inference"])
        for m, r in results.items()
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "seeds": seeds,
        "epochs": epochs,
        "test_images": tests,
        "methods": results,
    }
    if not quick:
        save("mnist_patches", figures, draw(results))
    finish("mnist_patches", ["method", "rate", *map(str, sizes), "MACs an image"], rows, **figures)


if __name__ == "__main__":
    main()
