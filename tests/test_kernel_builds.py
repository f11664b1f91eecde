"""Every Triton kernel compiles ahead of time for sm_80 and sm_90 as its launches configure it:
matrix units, no spills, shared memory within the chip's. Here, with ``-m sweep``, in bf16 and
fp16 at the large sizes; `python -m benchmarks.kernels` has every one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.sweep


def build(*options):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *options],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout.strip().splitlines()[-1])["builds"]


def test_builds():
    found = build("--quick")
    assert {b["arch"] for b in found} == {80, 90}
    kernels = {b["kernel"].split()[0] for b in found}
    assert kernels >= {"up", "rows", "hidden_backward", "weights", "low_rank", "gather", "scatter"}
    assert {b["kernel"].split()[0] for b in found if b["product"]} == {
        "up", "rows", "hidden_backward", "weights", "low_rank",
    }  # fmt: skip
    wrong = [(b["kernel"], b["arch"], b["faults"]) for b in found if b["faults"]]
    assert not wrong, wrong
