"""The adapter for Hugging Face models: example inputs, tracing, their calls, generate().

Imports transformers, so it is imported only for a Hugging Face model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.decorators import skip
from transformers.exporters.exporter_dynamo import (
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import apply_patches
from transformers.utils import ModelOutput, TransformersKwargs

from ..errors import InputError
from ..utils.warn import warn
from .caches.kv_cache import CACHE_NAMES, CacheFormat
from .caches.paged_cache import PagedCall, is_paged_call
from .host import Host
from .tools.pretrained import pretrained_class
from .tracing.broadcast_masks import broadcast_masks

EXAMPLE_BATCH, EXAMPLE_LENGTH = 3, 9
# keywords that a model accepts beyond its forward's signature
KNOWN_KWARGS = set(TransformersKwargs.__annotations__) | {"use_cache", "return_dict"}


class HuggingFaceHost(Host):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.takes: tuple[str, ...] = _takes(type(module))  # type: ignore[arg-type]
        self._known = KNOWN_KWARGS.union(self.takes)
        self.cache_name = _cache_name(type(module))  # type: ignore[arg-type]

    def model_class(self, base: type) -> type:
        return pretrained_class(base, self.module)

    @property
    def is_causal_lm(self) -> bool:
        """Whether generate() with a key-value cache makes sense for this model."""
        return (
            self.cache_name is not None
            and "input_ids" in self.takes
            and not self.config.is_encoder_decoder
            and bool(self.module.can_generate())
        )

    @property
    def keeps_cache(self) -> bool:
        """Whether a plain call returns a key-value cache or another state."""
        return self.cache_name is not None or "use_cache" in self.takes

    def declares_causal(self, rows: str | None) -> bool:
        return self.is_causal_lm or (rows or "").startswith("decoder_")

    def vocabulary(self) -> int:
        try:
            table = self.module.get_input_embeddings()
        except NotImplementedError:  # a model without a vocabulary
            return 2
        return table.num_embeddings if isinstance(table, nn.Embedding) else super().vocabulary()

    def example_inputs(self) -> dict[str, Any]:
        """Inputs made from the model's configuration."""
        model, config = self.module, self.config
        ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.long, device=model.device)
        main = model.main_input_name
        if main == "input_ids":
            example = {"input_ids": ids}
            if "attention_mask" in self.takes:
                example["attention_mask"] = torch.ones_like(ids)
            if config.is_encoder_decoder and "decoder_input_ids" in self.takes:
                example["decoder_input_ids"] = ids.clone()
            return example
        if main == "pixel_values":
            config = getattr(config, "vision_config", config)
            size = getattr(config, "image_size", None) or 224
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            shape = (EXAMPLE_BATCH, getattr(config, "num_channels", 3), height, width)
            return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}
        raise InputError(
            f"{self.name} takes {main}, for which no example is known: pass example_inputs, a dict "
            "of tensors with a batch dimension first"
        )

    @contextmanager
    def traced(self) -> Iterator[None]:
        """transformers' own patches for torch.export, undone on exit."""
        register_cache_pytrees_for_model(self.module)
        with ExitStack() as stack:
            stack.enter_context(super().traced())
            stack.enter_context(apply_patches("dynamo"))
            stack.enter_context(broadcast_masks())
            stack.enter_context(reset_model_state(self.module))
            yield

    # -- key-value caches ------------------------------------------------------------------------

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if not self.keeps_cache:
            return arguments
        return {k: v for k, v in arguments.items() if k != self.cache_name} | {"use_cache": False}

    def with_new_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self.without_cache(arguments) | {"use_cache": True}

    def split_cache(
        self, arguments: dict[str, Any], training: bool, caches: Callable[[], CacheFormat]
    ) -> tuple[dict[str, Any], bool, Any]:
        if is_paged_call(arguments):
            paged = PagedCall(arguments)
            return paged.read | {"use_cache": False, "cache": paged.bare()}, True, paged
        arguments = self._renamed(arguments)
        if unknown := arguments.keys() - self._known:
            raise InputError(
                f"{self.name} takes no argument {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(self.takes)}"
            )
        asked, given = arguments.get("use_cache"), arguments.get(self.cache_name or "")
        if self.is_causal_lm:
            keep = given is not None or bool(asked)
            if given is None and asked is None:
                config = self.config.get_text_config(decoder=True)
                keep = bool(getattr(config, "use_cache", False)) and not training
                keep = keep and caches().refusal is None  # nobody asked for the cache
            rest = {k: v for k, v in arguments.items() if k not in (self.cache_name, "use_cache")}
            return rest | {"use_cache": keep}, keep, given
        if asked or given is not None:
            raise InputError(
                f"use_cache={asked!r}: a converted {self.name} keeps no cache; decoder-only "
                "language models do"
            )
        return self.without_cache(arguments), False, None

    def _renamed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """With a cache under the name that the model gives it now, where its class takes older ones
        too. Raises InputError for two."""
        if self.cache_name != "cache":
            return arguments
        older = [n for n in arguments if n in CACHE_NAMES and n not in self.takes]
        given = [n for n in (*older, "cache") if n in arguments]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are one argument of {self.name}: pass cache")
        return {"cache" if n in older else n: value for n, value in arguments.items()}

    def cache_format(self) -> CacheFormat:
        return CacheFormat(self)

    def generate(
        self, call: Callable[..., Any], caches: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' generate()."""
        if self.config.is_encoder_decoder and self.module.can_generate():
            if kwargs.get("use_cache"):
                raise InputError(
                    f"{self.name}.generate(use_cache=True): a converted encoder-decoder keeps no "
                    "cache; leave use_cache out, and every step runs the decoder on all tokens"
                )
            kwargs["use_cache"] = False
        elif not self.is_causal_lm:
            raise InputError(
                f"{self.name}.generate(): only language models generate on their converted "
                "graphs; call to_dense().generate() for the original"
            )
        elif kwargs.get("use_cache") is not False:
            self._choose_cache(caches, kwargs)
        # of its own for every call, so that threads do not share it: only `forward` is another
        caller = copy.copy(self.module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            encoded = kwargs.get("encoder_outputs")
            if isinstance(encoded, ModelOutput):  # graphs take it as a tuple, as models do
                kwargs["encoder_outputs"] = encoded.to_tuple()
            return call(*args, **kwargs)

        skip(forward)  # generate() compiles it; `call` is compiled block by block
        forward.__signature__ = inspect.signature(self.module.forward)  # type: ignore[attr-defined]
        caller.forward = forward
        caller._prepare_static_cache = partial(_static_cache, caches)
        if kwargs.get("cache_implementation") == "paged":
            caller.generate_batch = call.generate_batch  # type: ignore[attr-defined]
        return caller.generate(*args, **kwargs)

    def _choose_cache(self, caches: Callable[[], CacheFormat], kwargs: dict[str, Any]) -> None:
        """Say that a generate() keeps no cache, where the model has one that no graph takes."""
        refusal = caches().refusal
        asked = {"use_cache", "cache_implementation", *CACHE_NAMES}.intersection(kwargs)
        if refusal is None or asked:  # the first call that is given a cache refuses it
            return
        warn(f"{refusal}: every new token runs all before it again")
        kwargs["use_cache"] = False


def _static_cache(
    caches: Callable[[], CacheFormat], cache_implementation: str, batch_size: int,
    max_cache_len: int, **_: Any,
) -> Any:  # fmt: skip
    """Instead of generate()'s own."""
    if "offloaded" in cache_implementation:
        raise InputError(
            f"cache_implementation={cache_implementation!r} offloads its layers one by one, which a "
            "graph that takes all of them at once would not do: choose 'static'"
        )
    return caches().new_static(batch_size, max_cache_len)


@cache
def _cache_name(kind: Any) -> str | None:
    """The argument that holds a key-value cache or another state; XLM's `cache`, a dict, does not."""
    given = inspect.signature(kind.forward).parameters
    named = (n for n in CACHE_NAMES if n in given and "dict" not in str(given[n].annotation))
    return next(named, None)


@cache
def _takes(kind: Any) -> tuple[str, ...]:
    """The named arguments of this class's forward."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
