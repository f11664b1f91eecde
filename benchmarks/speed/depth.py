"""How the time of a conversion and of first calls grows with depth, against PyTorch's own export."""

# python -m benchmarks.speed.depth [--quick]: width 64; seconds of the processor, once each, in a
# fresh process for each family that has converted a model of it before. export: torch.export of
# the dense model with 4 layers.

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

import moe_rewrite

from ..tools.fresh_process import answer, in_fresh_process
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 99,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 64, "n_head": 4, "vocab_size": 99}
VIT: dict[str, Any] = TEXT | {"image_size": 32, "patch_size": 8}
T5: dict[str, Any] = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "vocab_size": 99,
                      "decoder_start_token_id": 0}  # fmt: skip
FAMILIES = {
    "Llama": ("LlamaForCausalLM", lambda n: TEXT | {"num_hidden_layers": n}),
    "GPT-2": ("GPT2LMHeadModel", lambda n: GPT2 | {"n_layer": n}),
    "Gemma 3": ("Gemma3ForCausalLM", lambda n: TEXT | {"num_hidden_layers": n, "head_dim": 16}),
    "BERT": ("BertForMaskedLM", lambda n: TEXT | {"num_hidden_layers": n}),
    "ViT": ("ViTForImageClassification", lambda n: VIT | {"num_hidden_layers": n}),
    "T5, layers in each half": ("T5ForConditionalGeneration", lambda n: T5 | {"num_layers": n}),
    "ResNet, blocks": ("ResNetForImageClassification", lambda n: {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [n // 2, n - n // 2]}),
    "ConvNeXt, blocks": ("ConvNextForImageClassification", lambda n: {
        "num_stages": 2, "hidden_sizes": [16, 32], "depths": [n // 2, n - n // 2]}),
}  # fmt: skip


def build(family: str, layers: int) -> Any:
    import transformers

    name, sizes = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**sizes(layers))).eval()


def inputs(model: Any) -> dict[str, Any]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(1, 99, (2, 12))
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )


def seconds(run: Callable[[], Any]) -> float:
    return processor(run) / 1e3


def export(model: Any) -> None:
    given = inputs(model)
    batch = {name: {0: torch.export.Dim.AUTO} for name in given}
    if "use_cache" in model.forward.__code__.co_varnames:
        given, batch = given | {"use_cache": False}, batch | {"use_cache": None}
    torch.export.export(model, (), given, strict=False, dynamic_shapes=batch)


def family(name: str, depths: list[int]) -> dict[str, Any]:
    """Seconds: of the export, and for each depth of the conversion and of what comes first."""
    moe_rewrite.convert(build(name, 3), example_inputs=inputs(build(name, 3)))
    figures: dict[str, Any] = {"export": seconds(partial(export, build(name, 4)))}
    for layers in depths:
        model = build(name, layers)
        given = inputs(model)
        convert = cache(partial(moe_rewrite.convert, model, example_inputs=given))
        times, moe = {"convert": seconds(convert)}, convert()
        if model.can_generate() and not model.config.is_encoder_decoder:
            ids = given["input_ids"]
            generate = partial(
                moe.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=3,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            times["generate"] = seconds(generate)
        images = "pixel_values" in given
        labels = torch.zeros(2, dtype=torch.long) if images else given["input_ids"]
        call = {k: v for k, v in given.items() if k != "decoder_input_ids"} | {"labels": labels}
        times["train"] = seconds(partial(moe.train(), **call))
        figures[str(layers)] = times
    return figures


def main() -> None:
    torch.set_num_threads(2)
    if answer(family):
        return
    quick = is_quick(__doc__)
    depths = [4, 8] if quick else [8, 32]
    names = ["Llama"] if quick else list(FAMILIES)
    figures = {name: in_fresh_process(family, name, depths) for name in names}
    if not quick:
        save("depth", figures)
    rows = []
    for name, of in figures.items():
        low, high = (of[str(n)] for n in depths)
        first = "generate" if "generate" in high else "train"
        rows.append((
            name, f"{of['export']:.2f} s", f"{low['convert']:.2f} s", f"{high['convert']:.2f} s",
            f"{high['convert'] / low['convert']:.2f}",
            f"{high['convert'] / (1.3 * of['export'] + 1):.2f}",
            *(f"{high.get(k, float('nan')):.2f} s" for k in ("generate", "train")),
            f"{high[first] / high['convert']:.2f}",
        ))  # fmt: skip
    a, b = depths
    columns = [
        "model", "export, 4", f"convert, {a}", f"convert, {b}", f"{b} / {a}",
        "of 1.3 exports + 1 s", "first generate", "first training call", "first / convert",
    ]  # fmt: skip
    finish("depth", columns, rows, **figures)


if __name__ == "__main__":
    main()
