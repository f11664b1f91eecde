"""Tiny random models of every family of the installed transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "images": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
# what configurations call the same size, in the order in which a name is looked up
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (4, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth")),
    (32, ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim",
          "word_embed_proj_dim", "encoder_hidden_size", "lru_width", "hidden_dim_size")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads")),
    (2, ("num_key_value_heads", "n_head_kv", "num_kv_heads")),
    (8, ("head_dim", "d_kv", "kv_channels", "attention_head_size", "v_head_dim", "qk_head_dim")),
    (48, ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
          "ffn_hidden_size", "hidden_dim", "moe_intermediate_size", "shared_intermediate_size",
          "shared_expert_intermediate_size", "feed_forward_hidden_size")),
    (99, ("vocab_size", "encoder_vocab_size", "decoder_vocab_size")),
    (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    (2, ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")),
    (64, ("max_position_embeddings", "n_positions", "max_source_positions", "n_ctx",
          "max_target_positions", "max_encoder_position_embeddings",
          "max_decoder_position_embeddings")),
    (32, ("image_size",)),
)  # fmt: skip
STAGES = {
    "depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 24, 32), "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 2, 4), "num_attention_heads": (1, 2, 2, 4), "widths": (8, 16, 24, 32),
}  # fmt: skip


def families() -> Iterator[tuple[str, str, type]]:
    """(task, name of the class, class)."""
    import transformers
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for task, table in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            name = names[0] if isinstance(names, (list, tuple)) else names
            found = getattr(transformers, name, None)
            if name not in seen and found is not None:
                seen.add(name)
                yield task, name, found


# sizes that some classes derive from others, or keep in tables of their own: left out one after
# the other until a model runs
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (), ("head_dim",), ("head_dim", "num_key_value_heads"), ("max_position_embeddings",),
    ("head_dim", "num_key_value_heads", "num_attention_heads", "max_position_embeddings"),
)  # fmt: skip


def build(kind: type, runs: Callable[[nn.Module], Any]) -> nn.Module:
    """A tiny model of a class, on which `runs` does not raise. Raises what the first try raised."""
    first: Exception | None = None
    for left_out in LEFT_OUT:
        try:
            model = _build(kind, left_out)
            runs(model)
        except (Exception, MemoryError) as error:
            first = first or error  # type: ignore[assignment]
            continue
        return model
    assert first is not None
    raise first


def _build(kind: type, left_out: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(0)
    config: Any = kind.config_class  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(shrunk(config, left_out))
    for p in model.parameters():  # values that vanish would hide what is computed
        if p.is_floating_point() and p.ndim > 1:
            nn.init.normal_(p, std=(p.numel() / p.shape[0]) ** -0.5)
    return model.eval()


def shrunk(kind: Any, left_out: tuple[str, ...] = ()) -> Any:
    """A configuration of this class with small sizes, nested ones too. left_out: names in `SIZES`,
    each standing for all that are called so."""
    plain = kind()
    given: dict[str, Any] = {}
    for size, names in SIZES:
        for name in names if not {*names} & {*left_out} else ():
            known = getattr(plain, name, None)
            if isinstance(known, int) and not isinstance(known, bool):
                given[name] = min(size, known) if known > 0 else known
    for name, sizes in STAGES.items():
        known = getattr(plain, name, None)
        if isinstance(known, (list, tuple)) and known:
            given[name] = type(known)(sizes[-len(known) :]) if len(known) <= 4 else known
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(plain, name, None), int):
            given[name] = 1 if name != "eos_token_id" else 2
    for name, nested in getattr(kind, "sub_configs", {}).items():
        if isinstance(getattr(plain, name, None), nested):
            given[name] = shrunk(nested, left_out)
    return kind(**given)
