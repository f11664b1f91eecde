"""What transformers' tools ask of a model, for a converted one.

Trainer, pipeline and generate() take what is a PreTrainedModel; most of what that class does to its
modules is answered by the copy of the original, or refused with what to do instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...errors import ConversionError
from ..weights.structural_copy import working_copy
from .continuous_batching import ContinuousBatching
from .model_class import class_like


class Pretrained(PreTrainedModel):
    """The bases of a converted Hugging Face model are MoEModel and this."""

    host: Any
    _host_module: Any

    # -- answered by the copy of the original ----------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """A copy of the original's module, over this model's tensors: what a tool does to it (hooks,
        sharding) does not reach the module from which graphs are captured."""
        return _apart(self._host_module().get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        return _apart(self._host_module().get_output_embeddings())

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
        """The model without its head, for losses that compute the logits themselves (TRL)."""
        return Backbone(self) if self.host.module.base_model is not self.host.module else self

    @property
    def is_quantized(self) -> bool:  # type: ignore[override]
        """What is trained is not, whatever the base is; trainers ask for adapters otherwise."""
        return False

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Of the copy of the original: its configuration says by which attention a graph was captured."""
        self.host.module.set_attn_implementation(*args, **kwargs)

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


def _apart(module: Any) -> Any:
    return None if module is None else working_copy(module)


class Backbone:
    """A converted model up to its last hidden states; its attributes are the model's.

    The graph is the whole model's: where the model can compute few logits, it computes one.
    """

    def __init__(self, moe: Any) -> None:
        self._moe = moe

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        moe = self._moe
        head = moe.host.module.get_output_embeddings()
        named = {name for name, module in moe.host.module.named_modules() if module is head}
        if named & {site.site.name.removesuffix(".columns") for site in moe.expert_sites()}:
            raise ConversionError(
                f"{', '.join(named)} holds experts, which a loss that applies this head itself would "
                "leave out: convert without experts on the head"
            )
        few = {"logits_to_keep": 1} if "logits_to_keep" in moe.host.takes else {}
        outputs = moe(*args, **{**kwargs, **few}, output_hidden_states=True)
        name = moe.host.cache_name
        kept = {} if getattr(outputs, name or "", None) is None else {name: outputs[name]}
        return BaseModelOutputWithPast(last_hidden_state=outputs.hidden_states[-1], **kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._moe, name)


def pretrained_class(base: type, module: nn.Module) -> type:
    """The class of a converted Hugging Face model."""
    generates = (ContinuousBatching,) if isinstance(module, GenerationMixin) else ()
    return class_like(base, module, (Pretrained, *generates))
