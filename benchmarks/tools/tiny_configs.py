"""Configurations of transformers made small: by the names of sizes, and a table of what no name tells."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

LAYERS = 4
# what configurations call the same size; where the default is smaller, it stays
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
              "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth")),
    (32, ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim",
          "word_embed_proj_dim", "encoder_hidden_size", "lru_width", "hidden_dim_size",
          "true_hidden_size", "intra_bottleneck_size", "projection_dim", "ple_embed_dim", "hidden_size_global")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "attention_heads", "linear_num_heads", "linear_num_value_heads", "index_n_heads")),
    (2, ("num_key_value_heads", "n_head_kv", "num_kv_heads", "linear_num_key_heads")),
    (8, ("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_size", "v_head_dim",
         "qk_rope_head_dim", "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim",
         "linear_value_head_dim", "attention_head_dim", "index_head_dim", "mamba_d_head",
         "mamba_n_heads", "sequence_length_per_layer")),
    (4, ("rotary_dim",)),
    (16, ("kv_lora_rank", "q_lora_rank", "mamba_d_state", "state_size", "mamba_dt_rank",
          "time_step_rank", "hidden_size_per_layer_input", "laurel_rank", "hc_lowrank")),
    (48, ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "d_inner", "encoder_ffn_dim",
          "decoder_ffn_dim", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size",
          "shared_intermediate_size", "shared_expert_intermediate_size", "feed_forward_hidden_size",
          "shared_experts_intermediate_size")),
    (99, ("vocab_size", "encoder_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input",
          "encoder_hash_byte_group_vocab", "ngram_vocab_size_base", "projected_vocab_size")),
    (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    (2, ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "n_group",
         "num_expert_group", "num_kv_shared_layers", "mamba_n_groups", "n_groups")),
    (1, ("topk_group", "first_k_dense_replace", "num_dense_layers")),
    (64, ("max_position_embeddings", "n_positions", "max_source_positions", "n_ctx", "max_seq_len",
          "max_target_positions", "max_encoder_position_embeddings", "model_max_length",
          "max_decoder_position_embeddings")),
    (32, ("image_size",)),
)  # fmt: skip
STAGES = {
    "depths": (1, 1, 2, 1), "hidden_sizes": (8, 16, 24, 32), "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 2, 4), "num_attention_heads": (1, 2, 2, 4), "widths": (8, 16, 24, 32),
}  # fmt: skip
TOKENS = {
    "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# a layer that is left out at random is a branch on a value, which torch.export refuses in training
NEVER = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
# what a configuration's own rules ask for, by the name of its class or of the model's
OWN: dict[str, dict[str, Any]] = {
    "BitConfig": {"num_groups": 4},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]
            }
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8},
    "DonutSwinConfig": {"image_size": 64, "window_size": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "EfficientNetConfig": {
        "drop_connect_rate": 0.0, "width_coefficient": 0.05, "depth_coefficient": 0.25, "hidden_dim": 64,
        "image_size": 64,
    },
    "EsmConfig": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 32},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "HGNetV2Config": {
        "stem_channels": (3, 8, 8), "stage_in_channels": (8, 8, 16, 24),
        "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 24, 32),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16},
    "MobileBertConfig": {"embedding_size": 16},
    "MobileViTV2Config": {"image_size": 64},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "Nemotron3_5TranscribeHeadConfig": {"audio_hidden_size": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ReformerConfig": {
        "axial_pos_embds": False, "attn_layers": ("local", "lsh") * 2, "feed_forward_size": 48,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "SwinConfig": {"image_size": 64, "window_size": 2},
    "TextNetConfig": {"image_size": (64, 64)},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "Zamba2Config": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "mamba_headdim": 8, "adapter_rank": 4,
    },
}  # fmt: skip


def shrunk(
    kind: Any, left_out: tuple[str, ...] = (), instead: Mapping[str, Any] | None = None,
    model: str = "",
) -> Any:  # fmt: skip
    """A configuration of this class with small sizes, nested ones too.

    left_out: names in `SIZES`, each standing for all that are called so. instead: other values, by
    name, where the configuration has the name. model: the class that it is for.
    """
    plain = kind()
    known = {k: v for k, v in vars(plain).items() if not _is_derived(kind, k)}
    given: dict[str, Any] = {}
    for size, names in SIZES:
        for name in names if not {*names} & {*left_out} else ():
            if isinstance(known.get(name), int) and not isinstance(known[name], bool):
                given[name] = min(size, known[name]) if known[name] > 0 else known[name]
    for name, sizes in STAGES.items():
        of = known.get(name)
        if isinstance(of, (list, tuple)) and of:
            given[name] = type(of)(sizes[-len(of) :]) if len(of) <= 4 else of
    given |= {n: token for n, token in TOKENS.items() if isinstance(known.get(n), int)}
    given |= {n: value for n, value in NEVER.items() if isinstance(known.get(n), (int, float))}
    given |= {n: value for n, value in (instead or {}).items() if n in known}
    for name, nested in known.items():
        if name in getattr(kind, "sub_configs", {}) and hasattr(nested, "to_dict"):
            given[name] = shrunk(type(nested), left_out, instead)
    return kind(**{**given, **OWN.get(kind.__name__, {}), **OWN.get(model, {})})


def _is_derived(kind: Any, name: str) -> bool:
    """Whether this attribute is computed from others, so that it cannot be given."""
    return isinstance(inspect.getattr_static(kind, name, None), property)
