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
from functools import partial
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

    def draw(pool: torch.Tensor, n: int) -> torch.Tensor:
        return images[pool[torch.randint(len(pool), (n,), generator=generator)]]

    y = torch.randint(0, 2, (count,), generator=generator)
    others = (~torch.isin(labels, torch.tensor(CLASSES))).nonzero().flatten()
    patches = draw(others, count * GRID**2).view(count, GRID**2, PATCH, PATCH)
    where = torch.randint(GRID**2, (count,), generator=generator)
    for value, digit in enumerate(CLASSES):
        chosen = (y == value).nonzero().flatten()
        pool = (labels == digit).nonzero().flatten()
        patches[chosen, where[chosen]] = draw(pool, len(chosen))
    x = patches.view(count, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return Images(x.reshape(count, 1, GRID * PATCH, GRID * PATCH), 2.0 * y - 1, where)


def cnn(data: Images) -> torch.nn.Module:
    return PatchCNN(40)


def _pmoe(experts: int, router: PatchRouter) -> MoEModel:
    moe = moe_rewrite.convert(
        PatchCNN(40), split=0, router=router, num_experts=experts,
        experts=RegionExperts(combine="concat", halo=False),
        example_inputs=torch.zeros(2, 1, GRID * PATCH, GRID * PATCH),
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def joint(data: Images) -> MoEModel:
    return _pmoe(8, PatchRouter(GRID, 6, gate="selected"))


def separate(data: Images) -> MoEModel:
    """The router first, by gradient descent on ``-y <w1 - w2, sum of patches>`` (section 4.2)."""
    moe = _pmoe(2, PatchRouter(GRID, 2, gate="hard", init=0.0))
    w1, w2 = moe.router.rows
    whole = data.x.view(-1, GRID, PATCH, GRID, PATCH).sum((1, 3)).flatten(1)
    optimizer = torch.optim.SGD([w1, w2], lr=0.1)
    for x, y in zip(whole.split(BATCH), data.y.split(BATCH), strict=True):
        optimizer.zero_grad()
        (-y * (x @ (w1 - w2))).mean().backward()
        optimizer.step()
    for row in (w1, w2):
        row.requires_grad_(False)
    return moe


METHODS: dict[str, Callable[[Images], torch.nn.Module]] = {
    "CNN, 40 filters": cnn, "pMoE separate, 2 x 20": separate, "pMoE joint, 8 x 5": joint,
}  # fmt: skip


def train(
    method: str, data: Images, lr: float, epochs: int, seed: int, tick: Callable[[], None]
) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = METHODS[method](data)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(epochs):
        for index in torch.randperm(len(data.y)).split(BATCH):
            loss = F.softplus(-data.y[index] * model(data.x[index])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tick()
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Images) -> float:
    outputs = torch.cat([model(x) for x in data.x.split(200)])
    return float((outputs.sign() == data.y).float().mean())


@torch.no_grad()
def patch_gates(model: torch.nn.Module, data: Images) -> float | None:
    """How often some expert takes the patch that decides."""
    if not isinstance(model, MoEModel):
        return None
    patch_ids = torch.cat([model.route(x).patch_ids.flatten(1) for x in data.x.split(200)])
    return float((patch_ids == data.where[:, None]).any(1).float().mean())


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
        for method in METHODS:
            choose = compose(train_digits, sizes[len(sizes) // 3], seed=3000)
            scores = {
                lr: accuracy(train(method, choose, lr, epochs, 99, tick), held) for lr in RATES
            }
            lr = max(scores, key=lambda r: scores[r])
            table: dict[int, Any] = {}
            for size in sizes:
                models = [
                    train(method, compose(train_digits, size, seed), lr, epochs, seed, tick)
                    for seed in range(seeds)
                ]
                found = [accuracy(m, test) for m in models]
                table[size] = {
                    "accuracy": found, "mean": mean(found), "spread": pstdev(found),
                    "kept": [patch_gates(m, test) for m in models],
                }  # fmt: skip
            results[method] = {
                "lr": lr, "lr_scores": scores, "by_size": table, "macs": macs(models[-1]),
            }  # fmt: skip
    return results


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
