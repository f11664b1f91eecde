"""Tests of the Triton kernels: on a GPU where there is one, else as Triton's interpreter runs them.

It has to be on from the start of the process, so that tests/kernels/test_interpreted.py runs these
files in processes of their own; without it and without a GPU they are left out.
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
