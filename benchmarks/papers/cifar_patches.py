"""A wide ResNet on CIFAR-10 with experts on patches as its last stage, against the dense one."""

# python -m benchmarks.papers.cifar_patches [--quick]: test accuracy by number of training images at
# equal epochs, and multiply-adds. Both pMoE networks come out of `convert` (arXiv 2306.04073, section
# 5): 4 experts that take 16 of 64 patches, 8 experts that take 2 of 16; softmax over all patches,
# isolated patches, a quarter of the hidden channels each; all weights are trained from the start.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts
from moe_rewrite.models.resnet import ResNet

from ..tools.data import cifar10
from ..tools.plots import curves
from ..tools.report import finish, is_quick, mean_and_spread, over_seeds, save

SIZES, BATCH, RATE = (1000, 2500, 5000), 64, 0.1


def dense() -> torch.nn.Module:
    return ResNet(depth=8, widen=2)


def _pmoe(kernel: int, experts: int, grid: int, taken: int) -> MoEModel:
    moe = moe_rewrite.convert(
        ResNet(depth=8, widen=2, last_kernel=kernel), split="layer3", num_experts=experts,
        router=PatchRouter(grid, taken, gate="all"), freeze=False, batch_norm="update",
        experts=RegionExperts(halo=False, width=0.25), example_inputs=torch.zeros(2, 3, 32, 32),
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


METHODS: dict[str, Callable[[], torch.nn.Module]] = {
    "dense, 3x3": dense,
    "dense, last stage 1x1": lambda: ResNet(depth=8, widen=2, last_kernel=1),
    "pMoE 4 experts, 16 of 64, 1x1": lambda: _pmoe(1, 4, 8, 16),
    "pMoE 8 experts, 2 of 16, 3x3": lambda: _pmoe(3, 8, 4, 2),
}


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch shifted by up to four pixels and mirrored by halves."""
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, x.flip(3), x)


def train(
    method: str, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int, tick: Callable
) -> torch.nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = METHODS[method]().train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], RATE, momentum=0.9, weight_decay=5e-4
    )
    steps = epochs * len(range(0, len(y), BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(augmented(x[index], generator)), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        tick(len(y))
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((torch.cat([model(b) for b in x.split(250)]).argmax(1) == y).float().mean())


def measure(sizes: tuple[int, ...], seeds: int, epochs: int) -> dict[str, Any]:
    x, y = cifar10("data_batch_1")
    test_x, test_y = cifar10("test_batch")
    results: dict[str, Any] = {}
    with Progress() as progress:
        bar = progress.add_task("cifar_patches", total=len(METHODS) * seeds * sum(sizes) * epochs)
        for method in METHODS:
            table: dict[int, Any] = {}
            for size in sizes:
                found = []
                for seed in range(seeds):
                    generator = torch.Generator().manual_seed(seed)
                    chosen = torch.randperm(len(y), generator=generator)[:size]
                    tick = partial(progress.advance, bar)
                    model = train(method, x[chosen], y[chosen], epochs, seed, tick)
                    found.append(accuracy(model, test_x, test_y))
                table[size] = over_seeds(found)
            results[method] = {"by_size": table, "last_stage_macs": _macs(model)}
    return results


def _macs(model: torch.nn.Module) -> int:
    """Multiply-adds of the last stage on one image, the router's scores included."""
    if isinstance(model, MoEModel):
        assert model.report.macs is not None
        return model.report.macs.routed
    options = {"experts": RegionExperts(halo=False), "router": PatchRouter(4, 1), "split": "layer3"}
    report: Any = moe_rewrite.convert(
        model, **options, dry_run=True, example_inputs=torch.zeros(2, 3, 32, 32)
    )
    return report.macs.dense


def draw(results: dict[str, Any]) -> Any:
    labels = {n: f"{n} ({r['last_stage_macs'] / 1e6:.1f}M)" for n, r in results.items()}
    return curves(results, labels, "CIFAR-10, multiply-adds of the last stage")


def main() -> None:
    quick = is_quick(__doc__)
    sizes, seeds, epochs = ((128,), 1, 1) if quick else (SIZES, 2, 10)
    results = measure(sizes, seeds, epochs)
    rows = [
        (m, *map(mean_and_spread, r["by_size"].values()),
         f"{r['last_stage_macs']:,}")
        for m, r in results.items()
    ]  # fmt: skip
    figures: dict[str, Any] = {"seeds": seeds, "epochs": epochs, "methods": results}
    if not quick:
        save("cifar_patches", figures, draw(results))
    columns = ["network", *map(str, sizes), "MACs of the last stage"]
    finish("cifar_patches", columns, rows, **figures)


if __name__ == "__main__":
    main()
