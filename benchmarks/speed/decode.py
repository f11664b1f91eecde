"""A generated token, and a prompt of 512, on the converted graph against the dense model in Hugging
Face eager: with one expert, with 8, with none, and how much of a token goes to finding the graph whose
conditions the call meets.
"""

# python -m benchmarks.speed.decode [--quick] [--checks] [--processor]: batch 1, greedy, 2 threads;
# medians of rounds in which all models generate the same text. --checks: only what finding the graph
# and checking its conditions takes, with no dense model beside it; saves nothing. --processor: by time
# of one thread on the processor, for busy machines; saves nothing.

from __future__ import annotations

import sys
import time
import timeit
from functools import partial
from typing import Any

import torch

import moe_rewrite

from ..tools.data import model_folder
from ..tools.models import llama
from ..tools.report import finish, is_quick, save
from ..tools.timing import Clock, processor, side_by_side, wall

PROMPT = 512


def stories() -> torch.nn.Module | None:
    """The pretrained Llama of the shared data, if present."""
    from transformers import AutoModelForCausalLM

    folder = model_folder("stories260K")
    return AutoModelForCausalLM.from_pretrained(folder).eval() if folder.exists() else None


def gpt2() -> torch.nn.Module:
    """Of the small GPT-2's sizes, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def generated(model: Any, tokens: int, prompt: int = 16) -> torch.Tensor:
    ids = torch.arange(3, 3 + prompt).remainder(500).unsqueeze(0)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip


@torch.no_grad()
def products(model: torch.nn.Module, tokens: int) -> None:
    """The products of a row with each matrix of the model, which nothing can leave out."""
    maps = [m for m in model.modules() if getattr(m, "weight", None) is not None]
    weights: list[Any] = [m.weight for m in maps if not isinstance(m, torch.nn.Embedding)]
    for _ in range(tokens):
        for weight in (w for w in weights if w.ndim == 2):
            torch.mv(weight, torch.zeros(weight.shape[1]))


def checks(moe: Any, token_ms: float, calls: int = 1000) -> dict[str, Any]:
    """Microseconds of the last token's call that go to finding its graph (`find_us`: signature and
    conditions) and to the conditions alone (`conditions_us`); `share`: of the token."""
    seen: list[dict[str, Any]] = []
    find = moe.graph_for
    moe.graph_for = lambda arguments: seen.append(arguments) or find(arguments)
    try:
        generated(moe, 2)
    finally:
        del moe.graph_for
    arguments = seen[-1]
    graph, leaves = find(arguments)

    def microseconds(work: Any) -> float:
        return (
            1e6 * min(timeit.repeat(work, timer=time.thread_time, number=calls, repeat=5)) / calls
        )

    found = microseconds(lambda: find(arguments))
    checked = microseconds(lambda: graph.conditions.pattern(leaves))
    of = {"leaves": len(leaves), "find_us": found, "conditions_us": checked}
    return of | {"share": found / (1000 * token_ms)}


def forms(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "dense": model, "moe": moe_rewrite.convert(model),
        "8 experts": moe_rewrite.convert(model, num_experts=8),
    }  # fmt: skip


def generations(
    models: dict[str, Any], tokens: int, prompt: int, texts: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What generates, by name. texts: gets what each said last."""

    def generate(name: str, model: Any) -> None:
        texts[name] = generated(model, tokens, prompt)

    def without(model: Any) -> None:
        with model.disable_experts():
            generate("without experts", model)

    runs = {name: partial(generate, name, m) for name, m in models.items()}
    return runs | {"without experts": partial(without, models["moe"])}


def require_equal(texts: dict[str, torch.Tensor]) -> None:
    said = texts["dense"]
    assert all(torch.equal(t, said) for t in texts.values()), "a converted model says another text"


def prefill(models: dict[str, Any], rounds: int, clock: Clock = wall) -> dict[str, Any]:
    """Milliseconds up to the first token after a prompt of 512."""
    texts: dict[str, torch.Tensor] = {}
    times = side_by_side(generations(models, 1, PROMPT, texts), rounds, warm=2, clock=clock)
    require_equal(texts)
    names = ("moe", "8 experts", "without experts")
    return {
        "dense_ms": times.medians()["dense"],
        "ratios": {name: times.ratio(name, to="dense") for name in names},
        "quartiles_ms": times.quartiles(),
    }


def compare(
    model: torch.nn.Module, tokens: int, rounds: int, clock: Clock = wall
) -> dict[str, Any]:
    """Milliseconds of a token."""
    texts: dict[str, torch.Tensor] = {}
    models = forms(model)
    runs = generations(models, tokens, 16, texts)
    runs["products alone"] = partial(products, model, tokens)
    times = side_by_side(runs, rounds, warm=1, clock=clock)
    require_equal(texts)
    middle, quartiles = times.medians(), times.quartiles()
    return {
        "dense_ms": middle["dense"] / tokens, "moe_ms": middle["moe"] / tokens,
        "ratio": times.ratio("moe", to="dense"),
        "ratio_8_experts": times.ratio("8 experts", to="dense"),
        "ratio_without_experts": times.ratio("without experts", to="dense"),
        "ratio_products_alone": times.ratio("products alone", to="dense"),
        "quartiles_ms": {name: [q / tokens for q in of] for name, of in quartiles.items()},
        "checks": checks(models["moe"], middle["moe"] / tokens),
        "prefill": prefill(models, rounds, clock),
    }  # fmt: skip


def compare_checks(model: torch.nn.Module, tokens: int, rounds: int) -> dict[str, Any]:
    """In one thread's time on the processor, which other processes do not change much."""
    torch.set_num_threads(1)
    moe = moe_rewrite.convert(model)
    generated(moe, tokens)  # captures, and warms up
    seconds = timeit.repeat(
        lambda: generated(moe, tokens), timer=time.thread_time, number=1, repeat=rounds
    )
    token_ms = 1000 * min(seconds) / tokens
    return {"moe_ms": token_ms, "checks": checks(moe, token_ms)}


def main() -> None:
    only_checks, by_processor = "--checks" in sys.argv, "--processor" in sys.argv
    sys.argv = [a for a in sys.argv if a not in ("--checks", "--processor")]
    quick = is_quick(__doc__)
    torch.set_num_threads(1 if by_processor else 2)
    tokens, rounds = (16, 3) if quick else (30, 7) if by_processor else (100, 9)
    models = {
        "Llama, 8 layers, width 512": llama(8, 512, vocabulary=32000),
        "stories260K": stories(),
        "GPT-2 small": None if quick else gpt2(),
    }
    timed = partial(compare, clock=processor) if by_processor else compare
    measure = compare_checks if only_checks else timed
    figures = {n: measure(m, tokens, rounds) for n, m in models.items() if m is not None}
    if not (quick or only_checks or by_processor):
        save("decode", figures)
    cells = {name: _cells(f) for name, f in figures.items()}
    columns = ["model", *next(iter(cells.values()))]
    finish("decode", columns, [(n, *of.values()) for n, of in cells.items()], **figures)


def _cells(of: dict[str, Any]) -> dict[str, str]:
    """What is printed of a model, by column."""
    made = {"dense": f"{of['dense_ms']:.2f} ms"} if "dense_ms" in of else {}
    if "moe_ms" in of:
        made["one expert"] = f"{of['moe_ms']:.2f} ms"
    made |= {n.removeprefix("ratio_"): f"{v:.3f}" for n, v in of.items() if n.startswith("ratio")}
    if checked := of.get("checks"):
        made |= {
            "find graph": f"{checked['find_us']:.1f} us",
            "conditions alone": f"{checked['conditions_us']:.1f} us",
            "share of the token": f"{checked['share']:.2%}",
        }
    if prompt := of.get("prefill"):
        made[f"{PROMPT} tokens: dense"] = f"{prompt['dense_ms']:.1f} ms"
        made |= {f"{PROMPT} tokens: {n}": f"{v:.3f}" for n, v in prompt["ratios"].items()}
    return made


if __name__ == "__main__":
    main()
