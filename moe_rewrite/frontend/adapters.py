"""The adapter for a model."""

from __future__ import annotations

import sys

from torch import nn

from .host import Host


def host_of(module: nn.Module) -> Host:
    """A plain Host or a HuggingFaceHost; transformers is imported only for the latter."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(module, modeling.PreTrainedModel):
        from .huggingface import HuggingFaceHost

        return HuggingFaceHost(module)
    return Host(module)
