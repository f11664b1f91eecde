"""Image classifiers with growing heads, and streams of tasks of a few classes each."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ConfigError
from .problem import Batch, Model, Problem
from .tasks import Task


class ImageProblem(Problem):
    """Items are {"image": (C, H, W), "label": int}; the label is a column of the head.

    batch_size: images a step.
    argument: name of the model's argument for images.
    """

    scoring_batch = 128

    def __init__(self, batch_size: int = 32, argument: str = "x") -> None:
        self.batch_size, self.argument = batch_size, argument

    def batch(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Images (B, C, H, W) under the name of the model's argument, and labels (B,) int64."""
        return {
            self.argument: torch.stack([item["image"] for item in items]),
            "labels": torch.tensor([item["label"] for item in items]),
        }

    def predict(self, model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        out: Any = model(**self.inputs(batch))
        logits: torch.Tensor = out.logits if hasattr(out, "logits") else out
        return logits, batch["labels"]


@dataclass(frozen=True)
class Images:
    """pixels: (N, C, H, W) in 0 .. 1. labels: (N,) int64. Raises ConfigError for other shapes."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or len(self.pixels) != len(self.labels):
            raise ConfigError(
                f"images {tuple(self.pixels.shape)} and labels {tuple(self.labels.shape)}: "
                "expected (N, C, H, W) and (N,)"
            )

    def limited(self, per_class: int | None) -> Images:
        """The first `per_class` images of every class; None: all."""
        if per_class is None:
            return self
        classes = self.labels.unique()
        kept = torch.cat([(self.labels == c).nonzero().flatten()[:per_class] for c in classes])
        kept = kept.sort().values
        return Images(self.pixels[kept], self.labels[kept])


def read_images(folder: str | Path) -> tuple[Images, Images]:
    """(train, test) of a folder with MNIST's IDX files or CIFAR-10's python batches.

    Raises ConfigError for a folder without them, or with damaged ones.
    """
    folder = Path(folder)
    if (folder / "data_batch_1").exists():
        train = [_cifar_batch(f) for f in sorted(folder.glob("data_batch_*"))]
        return _join(train), _cifar_batch(folder / "test_batch")
    if any(folder.glob("train-images*")):
        return _idx(folder, "train"), _idx(folder, "t10k")
    raise ConfigError(
        f"{folder}: expected train-images-idx3-ubyte(.gz) and its companions, or data_batch_1 to 5 "
        "and test_batch"
    )


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))


def _idx(folder: Path, part: str) -> Images:
    pixels = _idx_array(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _idx_array(folder, f"{part}-labels-idx1-ubyte", 1)
    return Images(torch.tensor(pixels).unsqueeze(1) / 255.0, torch.tensor(labels.astype(np.int64)))


def _idx_array(folder: Path, name: str, ndim: int) -> np.ndarray:
    """Bytes of an IDX file: magic 0x0000_08_dd, big-endian sizes, data."""
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.exists()), None)
    if file is None:
        raise ConfigError(f"{folder / name}(.gz) is missing")
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        if raw[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(f"starts with {raw[:4].hex()}, not an IDX file of {ndim} dimensions")
        sizes = np.frombuffer(raw, ">u4", ndim, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape([int(s) for s in sizes])
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and runs nothing else that a pickle may name."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no image file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar_batch(file: Path) -> Images:
    try:
        batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pixels = torch.tensor(np.asarray(batch[b"data"], np.uint8)).view(-1, 3, 32, 32) / 255.0
        return Images(pixels, torch.tensor(batch[b"labels"]))
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise ConfigError(f"{file}: no readable CIFAR batch ({error})") from None


def fit_images(
    images: Images, shape: tuple[int, ...], mean: torch.Tensor, std: torch.Tensor
) -> Images:
    """The images for a model of inputs `shape` (C, H, W): grey ones repeated over the channels,
    resized, minus `mean` and divided by `std` (one value, or one a channel).

    Raises ConfigError for channels that do not fit.
    """
    channels, *size = shape
    pixels = images.pixels
    if pixels.shape[1] not in (1, channels):
        raise ConfigError(f"images of {pixels.shape[1]} channels for a model of {channels}")
    if tuple(pixels.shape[2:]) != tuple(size):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    pixels = pixels.expand(-1, channels, -1, -1)
    return Images((pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), images.labels)


def split_classes(
    train: Images,
    test: Images,
    per_task: int,
    first_column: int,
    name: str = "classes",
    limit: int | None = None,
) -> list[Task]:
    """Tasks of `per_task` classes each, in the order of labels.

    first_column: number of columns that the head has already; the tasks' columns come after them.
    limit: training images a task; None: all.
    """
    classes = sorted(set(train.labels.tolist()))
    if per_task < 1 or len(classes) % per_task:
        raise ConfigError(f"per_task={per_task}: {len(classes)} classes do not divide into it")
    tasks = []
    for start in range(0, len(classes), per_task):
        chosen = classes[start : start + per_task]
        column = {c: first_column + start + i for i, c in enumerate(chosen)}
        parts = [items_of(images, column) for images in (train, test)]
        label = f"{name} {'-'.join(map(str, chosen))}"
        tasks.append(Task(label, parts[0][:limit], parts[1], classes=per_task))
    return tasks


def items_of(images: Images, column: dict[int, int]) -> list[dict[str, Any]]:
    """Items of the images whose label has a column, with that column as their label."""
    return [
        {"image": pixels, "label": column[label]}
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True)
        if label in column
    ]
