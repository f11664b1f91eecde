"""What every benchmark prints and where its figures come from."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer repeats")
    return parser.parse_args()


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
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
    return x, torch.tensor(batch[b"labels"])


def data() -> Path:
    folder = Path(os.environ.get("MOE_REWRITE_DATA", "../shared")) / "data"
    if not folder.exists():
        raise SystemExit(f"{folder} is not there: set MOE_REWRITE_DATA to the shared data")
    return folder


def save(name: str, figures: dict[str, Any], figure: Any = None) -> None:
    """The result of a full run: benchmarks/results/NAME.json and, of a figure, docs/NAME.png."""
    root = Path(__file__).parent.parent
    for folder in (root / "benchmarks" / "results", root / "docs"):
        folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    about = machine() | {"commit": done.stdout.strip() or None}
    path = root / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(about | figures, indent=1) + "\n")
    if figure is not None:
        figure.savefig(root / "docs" / f"{name}.png", dpi=110)


def curves(results: dict[str, Any], labels: dict[str, str], title: str) -> Any:
    """A figure of test accuracy by number of training images, mean and spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, label in labels.items():
        by_size = results[name]["by_size"]
        means, spreads = ([r[k] for r in by_size.values()] for k in ("mean", "spread"))
        axis.errorbar([int(n) for n in by_size], means, spreads, marker="o", capsize=3, label=label)
    axis.set(xlabel="training images", ylabel="test accuracy", title=title)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def finish(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **figures: Any
) -> None:
    """Print the table, then one line of JSON: the figures, versions and machine."""
    from moe_rewrite.utils.text_tables import table

    print(table(columns, rows, name))
    print(json.dumps({"benchmark": name} | machine() | figures))


def in_fresh_process(module: str, task: str, *given: str) -> dict[str, Any]:
    """Run ``python -m MODULE --task TASK ...`` by itself and read the JSON that it prints last.

    Peak memory is a figure of a whole process: each measurement gets its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "--task", task, *given],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_mb(field: str) -> float:
    """VmHWM (peak since `forget_peak`) or VmRSS of this process, in MB (1e6 bytes); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
