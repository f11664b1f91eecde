"""A CIFAR-10 network learns MNIST's digits, two classes a task, and answers over all classes."""

# python -m benchmarks.papers.split_digits [--quick]: the pretrained ResNet-20, digits as RGB of 32 x 32,
# five tasks whose columns widen the head, CIFAR-10 accuracy as the base ability; no task identity at
# inference. PMoE and every other method, at equal trainable parameters for the adapters, each with
# its own learning rate, from `benchmarks.tune.tuning`.

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..tools.data import CIFAR_MEAN, CIFAR_STD, data, model_folder
from ..tools.plots import bars
from ..tools.report import finish, is_quick, save
from .streams import accuracies, facts, rows, runs, tuned, without_matrices

METHODS = (
    "pmoe", "pmoe-gradient", "full", "lora", "replay", "ewc", "lwf", "olora", "ranpac", "oracle",
    "joint",
)  # fmt: skip
SEEDS = (0, 1, 2)
REPLAY = 0.05  # the default is 20%
FULL = {"train": 150, "tested": 600, "base_tested": 500, "tasks": 5}
QUICK = {"train": 64, "tested": 100, "base_tested": 50, "tasks": 2}
TITLES = {"last": "accuracy on all ten digits after all tasks", "base": "CIFAR-10 accuracy"}


@cache
def pretrained() -> Any:
    from safetensors.torch import load_file

    from moe_rewrite.models.resnet import ResNet

    model = ResNet(20)
    weights = load_file(model_folder("resnet20-cifar10") / "model.safetensors")
    model.load_state_dict(weights, strict=False)
    return model.eval()


@cache
def files(folder: str) -> tuple[Any, Any]:
    from moe_rewrite.continual.images import read_images

    return read_images(data() / folder)


def drawn(folder: str, counts: tuple[int, int], seed: int, part: str) -> tuple[Any, Any]:
    """(train, test) images of a folder, drawn by the seed; part: ``"eval"`` draws both of the
    training images, none of them twice."""
    from moe_rewrite.continual.images import Images, fit_images

    train, test = files(folder)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=draw)
    chosen, rest = order[: counts[0]], order[counts[0] :]
    if part == "eval":
        others, tested = train, rest[: counts[1]]
    else:
        others, tested = test, torch.randperm(len(test.labels), generator=draw)[: counts[1]]
    cut = ((train, chosen), (others, tested))
    fitted = [
        fit_images(Images(i.pixels[at], i.labels[at]), (3, 32, 32), CIFAR_MEAN, CIFAR_STD)
        for i, at in cut
    ]
    return fitted[0], fitted[1]


def stream_of(
    seed: int, train: int, tested: int, base_tested: int, tasks: int, part: str = "test"
) -> tuple[Any, Any, list[Any], Any]:
    """(model, problem, tasks, base task)."""
    from moe_rewrite.continual.images import ImageProblem, items_of, split_classes
    from moe_rewrite.continual.tasks import Task

    digits = drawn("mnist", (12 * train, tested), seed, part)
    stream = split_classes(*digits, per_task=2, first_column=10, name="digits", limit=train)[:tasks]
    base = drawn("cifar-10-batches-py", (10 * train, base_tested), seed, part)
    base_task = Task("CIFAR-10", *(items_of(images, {c: c for c in range(10)}) for images in base))
    return pretrained(), ImageProblem(32), stream, base_task


def job(
    folder: Path, seed: int, method: str, lr: float, epochs: int, train: int, tested: int,
    base_tested: int, tasks: int, part: str = "test", split: int | str = "layer3", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One method over the stream; options: of the Setup."""
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.training import Training

    dense, problem, stream, base_task = stream_of(seed, train, tested, base_tested, tasks, part)
    training = Training(epochs=epochs, lr=lr, batch_size=32, seed=seed)
    setup = Setup(split=split, training=training, replay=REPLAY, **options)
    return run(method, dense, problem, stream, setup, base_task, "accuracy", folder).figures()


def main() -> None:
    quick = is_quick(__doc__)
    methods = ("pmoe", "ranpac") if quick else METHODS
    chosen, sizes = tuned(), QUICK if quick else FULL
    rates, epochs = chosen["rates"], 3 if quick else chosen["epochs"]
    seeds = SEEDS[:1] if quick else SEEDS
    variants = {
        m: {"method": m, "lr": rates.get(m, 1e-2), "epochs": epochs} | sizes for m in methods
    }
    found = runs(job, variants, seeds)
    results = {m: accuracies(f) | facts(f) for m, f in found.items()}
    if not quick:
        figures = {"seeds": len(seeds), "sizes": sizes, "epochs": epochs, "rates": rates}
        save("split_digits", figures | {"methods": results}, bars({"": results}, TITLES))
    columns = ["method", "last", "BWT", "CIFAR-10", "trained", "keeps data", "training"]
    keys = ["last", "bwt", "base"]
    finish("split_digits", columns, rows(results, keys), methods=without_matrices(results))


if __name__ == "__main__":
    main()
