"""A generated token with blocks that are compiled and with a static cache, against the dense model in
eager and compiled the same way."""

# python -m benchmarks.speed.decode_compiled [--quick]: batch 1, greedy, one expert, inductor; medians
# of rounds in which all forms generate the same text. Compiling takes minutes and is not counted.

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

import moe_rewrite

from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import side_by_side
from .decode import stories

STATIC = {"cache_implementation": "static"}


def forms(model: torch.nn.Module, static: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    """(model, options of generate) by name: dense ones compiled by accelerate, block by block."""
    from accelerate.utils import compile_regions

    compiled = moe_rewrite.convert(model)
    compiled.compile()  # type: ignore[call-arg]
    moe = moe_rewrite.convert(model)
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (model, {}),
        "dense compiled": (compile_regions(copy.deepcopy(model), dynamic=True), {}),
        "converted": (moe, {}),
        "compiled": (compiled, {}),
    }
    if static:
        made |= {
            "dense static": (model, STATIC),
            "static": (moe, STATIC),
            "static compiled": (compiled, STATIC),
        }
    return made


def compare(model: torch.nn.Module, tokens: int, rounds: int, static: bool) -> dict[str, Any]:
    """Milliseconds of a token of each form, and its time over the dense model's."""
    texts: dict[str, torch.Tensor] = {}

    def generate(name: str, model: Any, options: dict[str, Any]) -> None:
        ids = torch.arange(3, 19).unsqueeze(0)
        texts[name] = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=tokens, min_new_tokens=tokens, **options,
        )  # fmt: skip

    runs = {n: partial(generate, n, *form) for n, form in forms(model, static).items()}
    times = side_by_side(runs, rounds, warm=2)
    wrong = [n for n, text in texts.items() if not torch.equal(text, texts["dense"])]
    assert not wrong, f"{wrong} say something else"
    return {
        "ms": {name: ms / tokens for name, ms in times.medians().items()},
        "ratio": {name: times.ratio(name, to="dense") for name in runs},
        "compiled_to_dense_compiled": times.ratio("compiled", to="dense compiled"),
    }


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(2)
    if quick:
        models = {"Llama, 2 layers, width 64": llama(2, 64)}
    else:
        models = {"Llama, 8 layers, width 512": llama(8, 512, vocabulary=32000)}
        if (small := stories()) is not None:
            models["stories260K"] = small
    tokens, rounds = (4, 1) if quick else (60, 7)
    figures = {n: compare(m, tokens, rounds, not quick) for n, m in models.items()}
    if not quick:
        save("decode_compiled", figures)
    rows = [
        (n, form, f"{f['ms'][form]:.2f} ms", f"{ratio:.3f}")
        for n, f in figures.items()
        for form, ratio in f["ratio"].items()
    ]
    finish("decode_compiled", ["model", "form", "token", "over dense"], rows, **figures)


if __name__ == "__main__":
    main()
