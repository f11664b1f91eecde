"""The shared data and models: images of MNIST and CIFAR-10, folders of the others."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import torch

# the normalisation that the pretrained ResNet-20 was trained with
CIFAR_MEAN, CIFAR_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def data() -> Path:
    folder = _shared() / "data"
    if not folder.exists():
        raise SystemExit(f"{folder} is not there: set MOE_REWRITE_DATA to the shared data")
    return folder


def model_folder(name: str) -> Path:
    """The folder of a pretrained model, which may be missing."""
    return _shared() / "models" / name


def mnist(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (N, 28, 28) in 0 .. 1, labels (N,)) of the usual IDX files; part: train or t10k."""
    folder = data() / "mnist"
    images, labels = (
        gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        for name in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return torch.tensor(pixels / 255.0, dtype=torch.float32), torch.tensor(
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    )


def cifar10(part: str, normalized: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """((N, 3, 32, 32), labels (N,)) of one of the usual python batches, read from a local file."""
    with open(data() / "cifar-10-batches-py" / part, "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    x = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32) / 255.0
    if normalized:
        x = (x - CIFAR_MEAN[:, None, None]) / CIFAR_STD[:, None, None]
    return x, torch.tensor(batch[b"labels"])


def _shared() -> Path:
    return Path(os.environ.get("MOE_REWRITE_DATA", "../shared"))
