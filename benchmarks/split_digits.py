"""A CIFAR-10 network learns MNIST's digits, two classes a task, and answers over all classes.

``python -m benchmarks.split_digits [--quick]``: the pretrained ResNet-20, digits as RGB of 32 x 32,
five tasks whose columns widen the head, CIFAR-10 accuracy as the base ability; no task identity at
inference. PMoE against every rival, at equal trainable parameters for the adapters.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from .common import arguments, data, finish, save

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
METHODS = (
    "pmoe", "pmoe-gradient", "full", "lora", "replay", "ewc", "lwf", "olora", "ranpac", "oracle",
    "joint",
)  # fmt: skip


def pretrained() -> Any:
    from safetensors.torch import load_file

    from moe_rewrite.models.resnet import ResNet

    model = ResNet(20)
    folder = data().parent / "models" / "resnet20-cifar10"
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model.eval()


def job(method: str, seed: int, train: int, test: int, tasks: int, folder: str) -> dict[str, Any]:
    from moe_rewrite.continual.images import (
        ImageProblem,
        Images,
        fit_images,
        items_of,
        read_images,
        split_classes,
    )
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.tasks import Task
    from moe_rewrite.continual.training import Training

    torch.set_num_threads(1)

    def chosen(images: Images, count: int) -> Images:
        order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
        part = order[:count]
        return fit_images(Images(images.pixels[part], images.labels[part]), (3, 32, 32), MEAN, STD)

    digits = [chosen(i, n) for i, n in zip(read_images(data() / "mnist"), (12 * train, 10 * test), strict=True)]  # fmt: skip
    stream = split_classes(*digits, per_task=2, first_column=10, name="digits", limit=train)[:tasks]
    same = {c: c for c in range(10)}
    images = read_images(data() / "cifar-10-batches-py")
    base = [items_of(chosen(i, n), same) for i, n in zip(images, (10 * train, 500 if tasks == 5 else 50), strict=True)]  # fmt: skip
    own = Task("CIFAR-10", *base)
    setup = Setup(split="layer3", training=Training(epochs=3, lr=3e-3, batch_size=32, seed=seed))
    out = Path(folder) / f"{method}-{seed}"
    return run(
        method, pretrained(), ImageProblem(32), stream, setup, own, "accuracy", out
    ).figures()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def both(values: list[float]) -> dict[str, float]:
        return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else 0.0}

    return {
        "last": both([r["op"] for r in runs]), "bwt": both([r["bwt"] for r in runs]),
        "base": both([r["base_after"] for r in runs]), "base_before": runs[0]["base_before"],
        "trainable": runs[0]["trainable"], "keeps_data": runs[0]["keeps_data"],
        "seconds": mean(r["seconds"] for r in runs), "R": [r["R"] for r in runs],
        "router_use": runs[0]["router_use"],
    }  # fmt: skip


def draw(results: dict[str, dict[str, Any]]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    titles = {"last": "accuracy on all ten digits after all tasks", "base": "CIFAR-10 accuracy"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        means, spreads = ([r[key][k] for r in results.values()] for k in ("mean", "spread"))
        axis.barh(list(results), means, xerr=spreads, capsize=2)
        axis.invert_yaxis()
        axis.set_title(title)
    figure.tight_layout()
    return figure


def main() -> None:
    quick = arguments(__doc__ or "").quick
    seeds = (0,) if quick else (0, 1, 2)
    sizes = (64, 10, 2) if quick else (300, 60, 5)
    methods = ("pmoe", "ranpac") if quick else METHODS
    folder = os.environ.get("MOE_REWRITE_RUNS") or tempfile.mkdtemp()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {(m, s): pool.submit(job, m, s, *sizes, folder) for s in seeds for m in methods}
        from rich.progress import track

        figures = {key: future.result() for key, future in track(jobs.items(), "runs")}
    results = {m: summary([figures[m, s] for s in seeds]) for m in methods}
    if not quick:
        save("split_digits", {"seeds": len(seeds), "methods": results}, draw(results))
    rows = [
        (name, *(f"{r[k]['mean']:.3f} ± {r[k]['spread']:.3f}" for k in ("last", "bwt", "base")),
         r["trainable"], "yes" if r["keeps_data"] else "no", f"{r['seconds']:.0f} s")
        for name, r in results.items()
    ]  # fmt: skip
    columns = ["method", "last", "BWT", "CIFAR-10", "trained", "keeps data", "training"]
    short = {m: {k: v for k, v in r.items() if k != "R"} for m, r in results.items()}
    finish("split_digits", columns, rows, methods=short)


if __name__ == "__main__":
    main()
