"""Tests of the Triton kernels: on a GPU if there is one, else in Triton's interpreter.

The interpreter must be on from the start of a process, so tests/kernels/test_interpreted.py runs
each of these files in a separate process; without interpreter and GPU they are skipped.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
collect_ignore_glob = [] if GPU else ["test_on_gpu.py"] if INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def on_device(device):
    """New tensors lie there."""
    with device:
        yield
