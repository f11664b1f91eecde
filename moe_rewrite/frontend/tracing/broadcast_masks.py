"""transformers' attention masks in a trace: made by broadcasting, as its exporters to other formats
make them. A graph of the `vmap` that makes them otherwise is captured, but does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import masking_utils

NAMES = ("_vmap_expansion_sdpa", "_non_vmap_expansion_sdpa")  # absent in some versions


@contextmanager
def broadcast_masks() -> Iterator[None]:
    """In this context, functions of masks are called on indices that broadcast."""
    if not all(hasattr(masking_utils, name) for name in NAMES):
        yield
        return
    with patch.object(masking_utils, NAMES[0], _expanded):
        yield


def _expanded(mask: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*indices: torch.Tensor) -> torch.Tensor:
        broadcast = getattr(masking_utils, NAMES[1])(*indices)
        return mask(*broadcast).expand([i.shape[0] for i in indices])

    return made
