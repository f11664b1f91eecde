"""A benchmark's arguments, the table and line of JSON that it prints, and the results it saves."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from moe_rewrite.utils.text_tables import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="smaller models, fewer repeats")
    return made


def is_quick(description: str | None) -> bool:
    """Parse the arguments of a benchmark that has only --quick."""
    return parser(description).parse_args().quick


def over_seeds(accuracy: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": accuracy, "mean": mean(accuracy), "spread": pstdev(accuracy)}


def mean_and_spread(values: dict[str, Any]) -> str:
    return f"{values['mean']:.3f} ± {values['spread']:.3f}"


def finish(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **figures: Any
) -> None:
    """Print the table, then one line of JSON: the figures, versions and machine."""
    print(table(columns, rows, name))
    print(json.dumps({"benchmark": name} | machine() | figures))


def save(name: str, figures: dict[str, Any], figure: Any = None) -> None:
    """The result of a full run: benchmarks/results/NAME.json and, of a figure, docs/NAME.png."""
    about = machine() | {"commit": commit()}
    (RESULTS / f"{name}.json").write_text(json.dumps(about | figures, indent=1) + "\n")
    if figure is not None:
        figure.tight_layout()
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)


def read(name: str) -> dict[str, Any] | None:
    """What `save` wrote, if it did."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processor": _processor(),
    }


def _processor() -> str:
    """The processor's name, from Linux's /proc."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(": ")[-1] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def commit() -> str | None:
    """The checked-out commit, marked if the measured code differs from it."""
    commit = _git("rev-parse", "HEAD")
    code = ("moe_rewrite", "benchmarks", ":!benchmarks/results")
    return f"{commit}, changed" if commit and _git("status", "--porcelain", "--", *code) else commit


def _git(*given: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *given], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
