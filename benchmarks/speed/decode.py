"""A generated token on the converted graph against the dense model in Hugging Face eager."""

# python -m benchmarks.speed.decode [--quick]: batch 1, greedy, one expert, 2 threads; medians of
# rounds in which both models generate the same text.

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import moe_rewrite

from ..tools.data import model_folder
from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import side_by_side


def stories() -> torch.nn.Module | None:
    """The pretrained Llama of the shared data, if present."""
    from transformers import AutoModelForCausalLM

    folder = model_folder("stories260K")
    return AutoModelForCausalLM.from_pretrained(folder).eval() if folder.exists() else None


def compare(model: torch.nn.Module, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a token."""
    texts: dict[str, torch.Tensor] = {}

    def generate(name: str, model: Any) -> None:
        ids = torch.arange(3, 19).unsqueeze(0)
        texts[name] = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip

    models = {"dense": model, "moe": moe_rewrite.convert(model)}
    runs = {name: partial(generate, name, m) for name, m in models.items()}
    times = side_by_side(runs, rounds, warm=1)
    assert torch.equal(texts["dense"], texts["moe"]), "the converted model says something else"
    middle, quartiles = times.medians(), times.quartiles()
    return {
        "dense_ms": middle["dense"] / tokens, "moe_ms": middle["moe"] / tokens,
        "ratio": times.ratio("moe", to="dense"),
        "quartiles_ms": {name: [q / tokens for q in of] for name, of in quartiles.items()},
    }  # fmt: skip


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    tokens, rounds = (16, 3) if quick else (100, 9)
    models = {
        "Llama, 8 layers, width 512": llama(8, 512, vocabulary=32000),
        "stories260K": stories(),
    }
    figures = {n: compare(m, tokens, rounds) for n, m in models.items() if m is not None}
    if not quick:
        save("decode", figures)
    rows = [
        (n, f"{f['dense_ms']:.2f} ms", f"{f['moe_ms']:.2f} ms", f"{f['ratio']:.3f}")
        for n, f in figures.items()
    ]
    finish("decode", ["model", "dense", "converted", "ratio"], rows, **figures)


if __name__ == "__main__":
    main()
