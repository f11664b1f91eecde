"""Which host a model has: how the package calls it."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import ConversionError
from .host import Host


def without_wrapper(model: nn.Module) -> nn.Module:
    """The base model of PEFT's wrapper, with the active adapter in it; another model unchanged.

    Raises ConversionError for prompt learning, which only the wrapper does.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ConversionError(
            f"{type(model).__name__} with {type(config).__name__}: prompts are put in by PEFT's "
            "wrapper, outside of the model; convert the base model (get_base_model())"
        )
    return model.get_base_model()


def host_of(module: nn.Module) -> Host:
    """A plain Host or a HuggingFaceHost; transformers is imported only for the latter."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(module, modeling.PreTrainedModel):
        from .huggingface import HuggingFaceHost

        return HuggingFaceHost(module)
    return Host(module)
