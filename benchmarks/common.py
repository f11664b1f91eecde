"""What every benchmark prints and where its figures come from."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer repeats")
    return parser.parse_args()


def finish(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **figures: Any
) -> None:
    """Print the table, then one line of JSON: the figures, versions and machine."""
    from moe_rewrite.tables import table

    print(table(columns, rows, name))
    about = {
        "benchmark": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(about | figures))


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
