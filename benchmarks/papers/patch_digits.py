"""Images of 4 x 4 patches of which a digit decides the class, and networks that learn them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F

import moe_rewrite
from moe_rewrite import MoEModel, PatchRouter, RegionExperts
from moe_rewrite.models.patch_cnn import PatchCNN

CLASSES = (0, 1)  # the digits that decide: -1 and +1
GRID, PATCH, BATCH = 4, 28, 20
RATES = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Images:
    """x: (N, 1, 112, 112); y: (N,) -1 or 1; where: (N,) the patch that decides."""

    x: torch.Tensor
    y: torch.Tensor
    where: torch.Tensor


def joined(patches: torch.Tensor) -> torch.Tensor:
    """(N, 16, 28, 28) patches as (N, 1, 112, 112) images."""
    x = patches.view(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return x.reshape(-1, 1, GRID * PATCH, GRID * PATCH)


def drawn(pool: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    return pool[torch.randint(len(pool), (n,), generator=generator)]


def cnn(data: Images) -> torch.nn.Module:
    return PatchCNN(40)


def pmoe(experts: int, router: PatchRouter, dense: PatchCNN | None = None) -> MoEModel:
    moe = moe_rewrite.convert(
        dense or PatchCNN(40), split=0, router=router, num_experts=experts,
        experts=RegionExperts(combine="concat", halo=False),
        example_inputs=torch.zeros(2, 1, GRID * PATCH, GRID * PATCH),
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def joint(data: Images) -> MoEModel:
    return pmoe(8, PatchRouter(GRID, 6, gate="selected"))


def separate(data: Images) -> MoEModel:
    moe = pmoe(2, PatchRouter(GRID, 2, gate="hard", init=0.0))
    train_router(moe, data.x, data.y)
    return moe


def train_router(
    moe: MoEModel, x: torch.Tensor, y: torch.Tensor, rate: float = 0.1, epochs: int = 1
) -> None:
    """The rows of two experts, by gradient descent on ``-y <w1 - w2, sum of patches>`` (section
    4.2); frozen afterwards."""
    w1, w2 = moe.router.rows
    whole = x.view(-1, GRID, PATCH, GRID, PATCH).sum((1, 3)).flatten(1)
    optimizer = torch.optim.SGD([w1, w2], lr=rate)
    for _ in range(epochs):
        for images, labels in zip(whole.split(BATCH), y.split(BATCH), strict=True):
            optimizer.zero_grad()
            (-labels * (images @ (w1 - w2))).mean().backward()
            optimizer.step()
    for row in (w1, w2):
        row.requires_grad_(False)


Build = Callable[[Images], torch.nn.Module]
METHODS: dict[str, Build] = {
    "CNN, 40 filters": cnn, "pMoE separate, 2 x 20": separate, "pMoE joint, 8 x 5": joint,
}  # fmt: skip


def train(
    build: Build, data: Images, lr: float, epochs: int, seed: int, tick: Callable[[], None]
) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build(data)
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


def best_rate(
    build: Build, data: Images, held: Images, epochs: int, seeds: Sequence[int], tick: Callable
) -> tuple[float, dict[float, float]]:
    """(rate with the highest accuracy on held-out images, mean accuracy over seeds by rate)."""
    scores = {
        lr: mean(accuracy(train(build, data, lr, epochs, s, tick), held) for s in seeds)
        for lr in RATES
    }
    return max(scores, key=lambda lr: scores[lr]), scores
