"""Continuous batching (`generate_batch`): requests of several lengths, on the converted graph against
the dense model.
"""

# python -m benchmarks.speed.batching [--quick]: greedy, one thread, processor time of all threads
# (transformers schedules in a thread of its own); medians of rounds in which all answer the same
# requests.

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import processor, side_by_side
from .decode import forms, stories

REQUESTS, NEW = 16, 32


def prompts() -> list[list[int]]:
    """Of 4 to 64 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 65, (REQUESTS,), generator=draw).tolist()
    return [torch.randint(3, 500, (n,), generator=draw).tolist() for n in lengths]


def answered(model: Any, given: list[list[int]], tokens: int) -> list[list[int]]:
    """What the model says to each request."""
    made = model.generate_batch(
        given,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=256, page_size=16, max_batch_tokens=256, use_cuda_graph=False
        ),
        progress_bar=False,
    )
    errors = [request.error for request in made.values() if request.error]
    assert not errors, errors
    return [request.generated_tokens for request in made.values()]


def compare(model: torch.nn.Module, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a generated token of one request."""
    models, given = forms(model), prompts()
    said: dict[str, list[list[int]]] = {}

    def answer(name: str) -> None:
        said[name] = answered(models[name], given, tokens)

    for name in models:
        answer(name)
    gc.collect()
    gc.freeze()  # transformers collects garbage after each batch, half a second with all that is loaded
    times = side_by_side(
        {name: partial(answer, name) for name in models}, rounds, warm=1, clock=processor
    )
    gc.unfreeze()
    assert all(text == said["dense"] for text in said.values()), "another text"
    each = REQUESTS * tokens
    return {
        "dense_ms": times.medians()["dense"] / each,
        "ratios": {name: times.ratio(name, to="dense") for name in models if name != "dense"},
        "quartiles_ms": {name: [q / each for q in of] for name, of in times.quartiles().items()},
    }


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    tokens, rounds = (4, 3) if quick else (NEW, 5)
    models = {
        "stories260K": stories(),
        "Llama, 8 layers, width 512": None if quick else llama(8, 512, vocabulary=32000),
    }
    figures = {n: compare(m, tokens, rounds) for n, m in models.items() if m is not None}
    if not quick:
        save("batching", figures)
    columns = ["model", "a token, dense", "one expert", "8 experts"]
    rows = [
        (n, f"{of['dense_ms']:.3f} ms", *(f"{r:.3f}" for r in of["ratios"].values()))
        for n, of in figures.items()
    ]
    finish("batching", columns, rows, **figures)


if __name__ == "__main__":
    main()
