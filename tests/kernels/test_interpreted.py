"""Every Triton kernel in Triton's interpreter: each file of tests/kernels/triton in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "triton"
FILES = sorted(f for f in FOLDER.glob("test_*.py") if f.stem != "test_on_gpu")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_interpreted(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
