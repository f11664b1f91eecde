import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)
DATA = Path(os.environ.get("MOE_REWRITE_DATA", "../shared"))


@pytest.fixture(scope="session")
def stories():
    """The real pretrained Llama of the shared data."""
    folder = DATA / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"{folder} is absent: set MOE_REWRITE_DATA to the shared data")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()
