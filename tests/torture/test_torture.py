"""Random modules with random options: every outcome is right, or an error of ours. Mirrors nothing.

MOE_REWRITE_SEEDS="first:count" chooses other seeds; `pytest -m sweep` runs 1,500.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIRST, COUNT = map(int, os.environ.get("MOE_REWRITE_SEEDS", "0:12").split(":"))
ROOT = Path(__file__).parents[2]
SWEEP = [pytest.param(start, 100, marks=pytest.mark.sweep) for start in range(0, 1500, 100)]


@pytest.mark.parametrize("first, count", [(FIRST, COUNT), *SWEEP])
def test_random_modules_are_right_or_refused(first, count):
    """In a process of its own, which has no threads yet and may fork."""
    command = [sys.executable, "-m", "tests.torture.run", f"--seed={first}", f"--count={count}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["wrong"] == counts["raw"] == 0
    if count >= 100:  # or the test would mean little
        assert counts["right"] >= 0.6 * count and counts["experts_followed"] >= 0.4 * count
