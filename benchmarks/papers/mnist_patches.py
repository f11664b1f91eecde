"""pMoE's synthetic MNIST task: one of sixteen digit patches decides the class."""

# python -m benchmarks.papers.mnist_patches [--quick]: test accuracy by number of training images, of a
# patch CNN and of the two pMoE networks that `convert` makes of it: separate training (a router
# trained first on a linear loss, then frozen, hard gate, 2 experts of 20 filters, 2 patches each) and
# joint training (8 experts of 5 filters, 6 patches each, softmax over those). arXiv 2306.04073,
# sections 4 and 5. Each method has its best learning rate of one grid, chosen on held-out images.

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from moe_rewrite import MoEModel

from ..tools.data import mnist
from ..tools.plots import curves
from ..tools.report import finish, is_quick, mean_and_spread, over_seeds, save
from .patch_digits import (
    CLASSES,
    GRID,
    METHODS,
    PATCH,
    RATES,
    Images,
    accuracy,
    best_rate,
    drawn,
    joined,
    patch_gates,
    train,
)

SIZES = (100, 300, 500, 700, 900, 1000)


def compose(
    digits: tuple[torch.Tensor, torch.Tensor], count: int, seed: int, balanced: bool = False
) -> Images:
    """Images of 4 x 4 digits: one of a deciding class, fifteen of neither.

    balanced: exactly half of the images of each class; else classes are drawn.
    """
    images, labels = digits
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: torch.Tensor, n: int) -> torch.Tensor:
        return images[drawn(pool, n, generator)]

    if balanced:
        y = torch.randperm(count, generator=generator) % 2
    else:
        y = torch.randint(0, 2, (count,), generator=generator)
    others = (~torch.isin(labels, torch.tensor(CLASSES))).nonzero().flatten()
    patches = draw(others, count * GRID**2).view(count, GRID**2, PATCH, PATCH)
    where = torch.randint(GRID**2, (count,), generator=generator)
    for value, digit in enumerate(CLASSES):
        chosen = (y == value).nonzero().flatten()
        pool = (labels == digit).nonzero().flatten()
        patches[chosen, where[chosen]] = draw(pool, len(chosen))
    return Images(joined(patches), 2.0 * y - 1, where)


def macs(model: torch.nn.Module, experts: int = 0) -> dict[str, int]:
    """Multiply-adds of one image: forward, and forward and backward (no gradient of the image)."""
    dense = 40 * GRID**2 * PATCH**2
    if not isinstance(model, MoEModel):
        return {"inference": dense, "training": 2 * dense}
    costs = model.report.macs
    assert costs is not None
    trained = costs.experts + (costs.router if model.router.rows[0].requires_grad else 0)
    return {"inference": costs.routed, "training": costs.routed + trained}


def measure(sizes: tuple[int, ...], seeds: int, epochs: int, tests: int) -> dict[str, Any]:
    train_digits, test_digits = mnist("train"), mnist("t10k")
    test = compose(test_digits, tests, seed=1000)
    held = compose(train_digits, tests // 2, seed=2000)  # to choose the learning rate on
    runs = len(METHODS) * (len(RATES) + len(sizes) * seeds)
    results: dict[str, Any] = {}
    with Progress() as progress:
        bar = progress.add_task("mnist_patches", total=runs * epochs)
        tick = partial(progress.advance, bar)
        for method, build in METHODS.items():
            choose = compose(train_digits, sizes[len(sizes) // 3], seed=3000)
            lr, scores = best_rate(build, choose, held, epochs, [99], tick)
            table: dict[int, Any] = {}
            for size in sizes:
                models = [
                    train(build, compose(train_digits, size, seed), lr, epochs, seed, tick)
                    for seed in range(seeds)
                ]
                found = [accuracy(m, test) for m in models]
                kept = [patch_gates(m, test) for m in models]
                table[size] = over_seeds(found) | {"kept": kept}
            results[method] = {
                "lr": lr, "lr_scores": scores, "by_size": table, "macs": macs(models[-1]),
            }  # fmt: skip
    return results


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)  # small products: a second thread costs more than it saves
    sizes, seeds, epochs, tests = ((60,), 1, 3, 100) if quick else (SIZES, 5, 150, 2000)
    results = measure(sizes, seeds, epochs, tests)
    rows = [
        (m, r["lr"], *map(mean_and_spread, r["by_size"].values()),
         r["macs"]["inference"])
        for m, r in results.items()
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "seeds": seeds, "epochs": epochs, "test_images": tests, "methods": results,
    }  # fmt: skip
    if not quick:
        labels = {name: name for name in results}
        save("mnist_patches", figures, curves(results, labels, "One patch of 16 decides"))
    finish("mnist_patches", ["method", "rate", *map(str, sizes), "MACs an image"], rows, **figures)


if __name__ == "__main__":
    main()
