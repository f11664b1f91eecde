"""Continuous batching of transformers (`generate_batch`) by a converted model: what is asked of it
before it starts, since errors in its thread are logged and come back as requests without tokens.

Imports transformers, so it is imported only for a Hugging Face model.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from ...errors import ConfigError, InputError
from ..caches.paged_cache import require_apart

ATTENTION = ("sdpa", "eager", "paged|eager")
# options that would compile a whole call, or record it as a CUDA graph
WHOLE_CALLS = (
    "use_cuda_graph", "q_padding_interval_size", "kv_padding_interval_size",
    "varlen_compile_config", "decode_compile_config", "default_compile_level",
)  # fmt: skip


class ContinuousBatching(GenerationMixin):
    """A base of converted models that generate; see `paged_cache` for their calls."""

    host: Any
    router: Any
    _store: Any
    _override: Any
    _cache_format: Any

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> Any:
        """As transformers'. Raises InputError or ConfigError for what it cannot do."""
        self._require_batchable()
        config = _settled(self.host, continuous_batching_config or _of(generation_config))
        if self.router.keeps_state:
            self._keep_states_apart(generation_config or self.generation_config, config)
        return super().init_continuous_batching(generation_config, config, workload_hints)

    def _require_batchable(self) -> None:
        host = self.host
        if not host.is_causal_lm:
            raise InputError(f"{host.name}.generate_batch(): decoder-only language models batch")
        if refusal := self._cache_format().refusal:
            raise InputError(f"{refusal}: generate_batch() needs one; call generate(...)")
        if self._store.parallel is not None or self._store.sharded:
            raise ConfigError(
                "continuous batching of a model that is divided over processes: each would schedule "
                "other requests; run it on a whole model in one process"
            )
        if self._override.planner is not None or self._override.features is not None:
            raise ConfigError(
                "continuous batching runs in a thread of its own, which a context that replaces the "
                "router's plan (disable_experts, use_expert, ...) does not reach: use "
                "moe.activate(name) and moe.deactivate(name)"
            )
        require_apart(self.router)

    def _keep_states_apart(self, generation: Any, config: ContinuousBatchingConfig) -> None:
        """The router's sums are a request's own, so its pages must be. Raises InputError."""
        what = "continuous batching with a prefix router"
        way = "; or convert with TokenRouter(granularity='token')"
        if (copies := generation.num_return_sequences or 1) > 1:
            raise InputError(
                f"{what} and num_return_sequences={copies}: requests that are copied leave its sums "
                f"behind; pass the prompt {copies} times{way}"
            )
        if config.cpu_offload_space != 0:
            raise InputError(
                f"{what} and cpu_offload_space={config.cpu_offload_space}: pages that move leave its "
                f"sums behind; leave it at 0{way}"
            )
        config.allow_block_sharing = False


def _of(generation: Any) -> Any:
    return getattr(generation, "continuous_batching_config", None)


def _settled(host: Any, given: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """The options that graphs can be run with. Raises InputError for others."""
    config = copy.deepcopy(given) if given is not None else ContinuousBatchingConfig()
    text = host.config.get_text_config()
    wanted = [n for n in WHOLE_CALLS if (v := getattr(config, n)) and v != (False, False)]
    if getattr(text, "compile_config", None) is not None:
        wanted.append("compile_config of the model's configuration")
    if wanted:
        raise InputError(
            f"continuous batching with {', '.join(wanted)}: a converted model's calls choose a graph "
            "and plan routes in Python; leave it out, and call moe.compile() to compile its blocks"
        )
    if (attention := host.config._attn_implementation) not in ATTENTION:
        raise InputError(
            f"continuous batching with attn_implementation={attention!r}: graphs read pages by "
            f"{', '.join(ATTENTION)}; call moe.set_attn_implementation('sdpa')"
        )
    try:
        group_layers_by_attn_type(text)
    except ValueError as error:
        raise InputError(f"transformers does not batch {host.name} continuously: {error}") from None
    config.auto_switch_to_flash, config.use_cuda_graph = False, False
    return config
