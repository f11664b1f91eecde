"""Tiny random models of many architectures, for the equivalence tests."""

import torch

from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.example_inputs import random_arguments

TEXT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
PLAIN = {**TEXT, "intermediate_size": 48, "max_position_embeddings": 64}


def build(name, layers=3):
    import transformers as tf

    torch.manual_seed(0)
    causal = {
        "Llama": PLAIN | {"num_key_value_heads": 2},
        "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "GPTNeoX": PLAIN,
        "Qwen3": PLAIN | {"num_key_value_heads": 2, "head_dim": 8},
        "Gemma3": PLAIN | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
        "Mistral": PLAIN | {"num_key_value_heads": 2, "sliding_window": 6},
        "Phi": PLAIN,
        "OPT": PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        "Falcon": {**TEXT, "max_position_embeddings": 64},
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in causal:
        prefix = "Gemma3Text" if name == "Gemma3" else name
        sizes = causal[name] | ({"num_hidden_layers": layers} if layers != 3 else {})
        config = getattr(tf, f"{prefix}Config")(**sizes, **ids)
        head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(tf, f"{name}{head}")(config).eval()
    if name == "ConvNext":
        config = tf.ConvNextConfig(
            hidden_sizes=[8, 16],
            depths=[1, 2],
            num_stages=2,
            image_size=32,
            layer_scale_init_value=1.0,
        )
        return tf.ConvNextModel(config).eval()
    if name in ("ViT", "Dinov2"):
        shared = {k: v for k, v in TEXT.items() if k != "vocab_size"}
        config = getattr(tf, f"{name}Config")(
            **shared, intermediate_size=48, image_size=16, patch_size=4
        )
        return getattr(tf, f"{name}Model")(config).eval()
    heads = {
        "Bert": "BertForMaskedLM",
        "Roberta": "RobertaForMaskedLM",
        "DistilBert": "DistilBertForMaskedLM",
        "DebertaV2": "DebertaV2ForMaskedLM",
        "ModernBert": "ModernBertForMaskedLM",
    }
    options = dict(PLAIN)
    if name == "DistilBert":
        options = {"vocab_size": 97, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    if name == "DebertaV2":
        options |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    if name == "ModernBert":
        options |= {"cls_token_id": 1, "sep_token_id": 2}
    return getattr(tf, heads[name])(getattr(tf, f"{name}Config")(**options, **ids)).eval()


def with_dropout(model, p):
    """Turn on whatever dropout the model has a place for."""
    names = (
        "attention_dropout", "attn_dropout", "dropout", "dropout_prob", "hidden_dropout",
        "activation_dropout", "dropout_p",
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    for holder in (model.config, *model.modules()):
        for name in names:
            if isinstance(getattr(holder, name, None), float):
                setattr(holder, name, p)
    return model


def build_other(name):
    """Encoder-decoders, shared layers, and heads that pool: not asked of generation."""
    import transformers as tf

    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "T5":
        config = tf.T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, **ids,
        )  # fmt: skip
        return tf.T5ForConditionalGeneration(config).eval()
    if name == "Bart":
        config = tf.BartConfig(
            vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64, **ids,
        )  # fmt: skip
        return tf.BartForConditionalGeneration(config).eval()
    if name == "Albert":
        config = tf.AlbertConfig(**PLAIN | {"embedding_size": 16, "num_hidden_layers": 4}, **ids)
        return tf.AlbertForMaskedLM(config).eval()
    if name == "LlamaClassifier":
        return tf.LlamaForSequenceClassification(tf.LlamaConfig(**PLAIN, **ids)).eval()
    if name == "Qwen3Moe":
        config = tf.Qwen3MoeConfig(
            **PLAIN, head_dim=8, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, **ids,
        )  # fmt: skip
        return tf.Qwen3MoeForCausalLM(config).eval()
    raise KeyError(name)


CAUSAL = [
    "Llama", "GPT2", "GPTNeoX", "Qwen3", "Gemma3", "Mistral", "Phi", "OPT", "Bloom", "Falcon",
]  # fmt: skip
ENCODERS = ["Bert", "Roberta", "DistilBert", "DebertaV2", "ModernBert"]
VISION = ["ViT", "Dinov2", "ConvNext"]
ALL = CAUSAL + ENCODERS + VISION


def example_inputs(model):
    """Those that a conversion captures the model with."""
    return host_of(model).example_inputs()


def random_call(model, batch):
    return random_arguments(example_inputs(model), host_of(model).vocabulary(), batch)


def sharp_llama():
    """Of two layers, whose answers are far from uniform."""
    model = build("Llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model
