import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0"
)  # costs more than it gives at our sizes
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers, two cores
DATA = Path(os.environ.get("MOE_REWRITE_DATA", "../shared"))


@pytest.fixture(scope="session")
def data():
    """The folder of shared data and models."""
    if not (DATA / "models").exists():
        pytest.skip(f"{DATA} holds no models: set MOE_REWRITE_DATA to the shared data")
    return DATA


@pytest.fixture(scope="session")
def stories(data):
    """The real pretrained Llama of the shared data."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data / "models" / "stories260K").eval()
