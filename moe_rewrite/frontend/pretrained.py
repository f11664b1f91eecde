"""What transformers' tools ask of a model, for a converted one.

Trainer, pipeline and generate() take what is a PreTrainedModel; most of what that class does to its
modules is answered by the copy of the original, or refused with what to do instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..errors import ConversionError
from .model_class import class_like


class Pretrained(PreTrainedModel):
    """The bases of a converted Hugging Face model are MoEModel and this."""

    host: Any
    _host_module: Any

    # -- answered by the copy of the original ----------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The original's module, over this model's tensors."""
        return self._host_module().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self._host_module().get_output_embeddings()

    def can_generate(self) -> bool:  # type: ignore[override]
        return self.host.is_causal_lm

    @property
    def generation_config(self) -> Any:  # type: ignore[override]
        """As the original's; what is set in it, `generate` follows."""
        if "generation_config" not in vars(self.host.module):
            raise AttributeError(f"{self.host.name} has no generation_config")
        return self.host.module.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.host.module.generation_config = config

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.module.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def base_model(self) -> Any:
        """The model itself: its parts do not run alone."""
        return self

    # -- nothing to do ---------------------------------------------------------------------------

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tied weights are one tensor always."""

    def enable_input_require_grads(self) -> None:
        """Checkpointed blocks need no input that requires a gradient."""

    def disable_input_require_grads(self) -> None: ...

    # -- refused ---------------------------------------------------------------------------------

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConversionError(
            "resize_token_embeddings: the graphs of a converted model have its vocabulary. Resize "
            "the dense model, then convert it"
        )

    def set_input_embeddings(self, value: Any) -> NoReturn:
        raise ConversionError(
            "a converted model's modules cannot be replaced: change the dense model, then convert it"
        )

    set_output_embeddings = set_input_embeddings

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConversionError(
            "a converted model has experts instead of adapters: expand() adds one, "
            "add_expert(from_peft=folder) reads one"
        )

    load_adapter = add_adapter

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConversionError(
            "a converted model is read by moe_rewrite.load(folder, model), with the dense model"
        )


def pretrained_class(base: type, module: nn.Module) -> type:
    """The class of a converted Hugging Face model."""
    generates = (GenerationMixin,) if isinstance(module, GenerationMixin) else ()
    return class_like(base, module, (Pretrained, *generates))
