"""TRACE by its own scores of generated answers, in percent, in both orders, beside published figures."""

# python -m benchmarks.papers.trace_scores [--quick]: stories260K, the sizes of STORIES below; learning
# rates of the methods that benchmarks.papers.trace does not have are searched on its grid, by loss on
# eval items. For another model, on a GPU if there is one, again and again until it is through:
# python -m benchmarks.papers.trace_scores --model FOLDER --runs FOLDER [--order 1 2] [--seeds 0 1 2]
# [--methods pmoe,replay] [--device cuda] [--lr 2e-4] [--items 500] ...: sizes of OTHERS, one learning
# rate for all; a finished run is read from its folder, a stopped one goes on after its last task.

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from moe_rewrite.utils.atomic_files import write_json
from moe_rewrite.utils.text_tables import table

from ..tools.data import data, model_folder
from ..tools.plots import bars
from ..tools.report import finish, machine, parser, save
from . import trace
from .streams import Figures, facts, runs, spread

# 1: TRACE's own (arXiv 2310.06762, section 4.1). 2: of its appendix on another order (table 26), which
# the code of SEEKR (arXiv 2411.06171) and of Any-SSR (arXiv 2503.13575) runs as their second
ORDERS = {
    1: ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
    2: ("NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "C-STANCE", "Py150", "MeetingBank", "ScienceQA"),
}  # fmt: skip
# OP and BWT of Llama-2-7B-chat trained on 5,000 items a task, as Any-SSR and SEEKR give them: not
# measured here. Any-SSR's are the same in both orders
PUBLISHED = {
    "Any-SSR": (55.69, 0.00), "SEEKR, replay of 1%": (54.99, -2.61), "replay of 1%": (48.47, -9.69),
    "O-LoRA": (44.64, -4.20), "joint training": (59.38, None),
}  # fmt: skip
NEW = ("osf", "arrow")  # their rates are searched here; Any-SSR's experts are trained as PMoE's
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING = {"items": 32, "tested": 16, "tasks": 3, "epochs": 2, "part": "eval"}
TUNING_SEED = 100
METHODS: dict[str, Figures] = {
    "pmoe": {}, "anyssr": {}, "arrow": {}, "osf": {}, "olora": {}, "lora": {},
    "replay 20%": {"method": "replay"}, "replay 1%": {"method": "replay", "replay": 0.01},
    "oracle": {}, "joint": {},
}  # fmt: skip
STORIES: Figures = {
    "items": 48, "tested": 12, "tasks": 8, "epochs": 2, "length": 128, "new_tokens": 12,
    "split": trace.SPLIT, "precision": "no",
}  # fmt: skip
OTHERS: Figures = STORIES | {
    "items": 500, "tested": 100, "epochs": 0, "length": 1024, "new_tokens": 256, "split": "auto",
    "precision": "bf16",
}  # fmt: skip
QUICK: Figures = STORIES | {"items": 8, "tested": 3, "tasks": 2, "epochs": 1, "new_tokens": 4}
RATE = 2e-4  # of another model


@cache
def pretrained(model: str, length: int, new_tokens: int) -> tuple[Any, Any]:
    """The model, which no method changes, and its problem."""
    from transformers import AutoTokenizer

    from moe_rewrite.cli.loading import load_model
    from moe_rewrite.continual.text import TextProblem

    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_model(model), TextProblem(tokenizer, length, new_tokens=new_tokens)


@cache
def own_text(model: str, length: int, new_tokens: int, items: int, tested: int, seed: int) -> Any:
    """Texts that the model writes, as its base task; on the device that methods train on."""
    from moe_rewrite.continual.training import Training, accelerator

    dense, problem = pretrained(model, length, new_tokens)
    before = next(dense.parameters()).device
    dense.to(accelerator(Training()).device)
    task = problem.base_task_of(dense, items, tested, seed)
    dense.to(before)
    return task


def job(
    folder: Path, seed: int, method: str, order: int, lr: float, model: str, items: int, tested: int,
    tasks: int, epochs: int, length: int, new_tokens: int, split: int | str, precision: Any,
    **options: Any,
) -> Figures:  # fmt: skip
    """One method over the stream in one order. epochs: of every task; 0: TRACE's own."""
    from moe_rewrite.cli.loading import parse_split
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.tasks import read_stream
    from moe_rewrite.continual.training import Training

    dense, problem = pretrained(model, length, new_tokens)
    named = {t.name: t for t in read_stream([data() / "TRACE"], epochs=epochs or None)}
    stream = [
        replace(named[n], train=named[n].train[:items], test=named[n].test[:tested], eval=())
        for n in ORDERS[order][:tasks]
    ]
    base_task = own_text(model, length, new_tokens, items, tested, seed)
    training = Training(lr=lr, seed=seed, mixed_precision=precision)
    setup = Setup(split=parse_split(str(split)), training=training, **options)
    return run(method, dense, problem, stream, setup, base_task, "task", folder).figures()


def best_rates() -> tuple[dict[str, float], Figures]:
    """The learning rate of each new method by its loss, and the losses that decided it."""
    asked = {f"tuning {m}@{r:g}": {"method": m, "lr": r} | TUNING for m in NEW for r in GRID}
    losses: dict[str, dict[str, float]] = {m: {} for m in NEW}
    for name, (figures,) in runs(trace.job, asked, [TUNING_SEED], workers=1).items():
        losses[asked[name]["method"]][f"{asked[name]['lr']:g}"] = -figures["op"]
    return {m: float(min(of, key=lambda r: of[r])) for m, of in losses.items()}, losses


def percent(found: Sequence[Figures]) -> Figures:
    """OP, BWT and the score of each task at the end, in percent."""
    names = found[0]["tasks"]
    last = {n: spread([100 * r["R"][-1][j] for r in found]) for j, n in enumerate(names)}
    return {
        "op": spread([100 * r["op"] for r in found]), "bwt": spread([100 * r["bwt"] for r in found]),
        "frozen": spread([100 * mean(r["before"]) for r in found]), "by_task": last,
        "base": spread([100 * r["base_after"] for r in found]),
        "base_before": spread([100 * r["base_before"] for r in found]),
    } | facts(found)  # fmt: skip


def measured(given: argparse.Namespace, sizes: Figures, rates: Mapping[str, float]) -> Figures:
    """method -> order -> figures."""
    variants = {
        f"{name}, order {order}": sizes | {"method": name, "lr": rates[name.split()[0]], "order": order}
        | {"model": str(given.model)} | METHODS[name]
        for order in given.order
        for name in given.methods
    }  # fmt: skip
    found = runs(job, variants, given.seeds, given.runs, workers=1)
    return {
        name: {str(order): percent(found[f"{name}, order {order}"]) for order in given.order}
        for name in given.methods
    }


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", type=Path, help="a language model's folder; default: stories260K")
    made.add_argument("--runs", type=Path, help="folder of the runs, from which a start goes on")
    made.add_argument("--order", type=int, nargs="+", choices=ORDERS, default=list(ORDERS))
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--methods", default=",".join(METHODS), help="with commas")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    made.add_argument("--lr", type=float, help=f"of adapters of another model; default {RATE}")
    for name, value in OTHERS.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), help="of another model")
    given = made.parse_args()
    given.methods = given.methods.split(",")
    if unknown := [m for m in given.methods if m not in METHODS]:
        made.error(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    if given.model is None and (given.lr or any(getattr(given, n) is not None for n in OTHERS)):
        made.error("sizes and --lr are of another model: give --model")
    if given.model is not None and given.runs is None:
        made.error("--model needs --runs, the folder in which a stopped run goes on")
    return given


def use_device(device: str | None) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # read by accelerate, in the runs' processes too


def shown(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.2f}" + (f" ± {value['spread']:.2f}" if value["spread"] else "")


def main() -> None:
    given = arguments()
    use_device(given.device)
    own = given.model is None
    given.model = given.model or model_folder("stories260K")
    if given.quick:
        given.methods, given.order, given.seeds = ["pmoe", "arrow"], [2], [0]
    searched: Figures = {}
    if own:
        sizes, rates = (
            QUICK if given.quick else STORIES,
            trace.RATES | dict.fromkeys(("anyssr", *NEW), trace.RATES["pmoe"]),
        )
        if not given.quick:
            chosen, searched = best_rates()
            rates |= chosen
    else:
        asked = {n: getattr(given, n) for n in OTHERS if getattr(given, n) is not None}
        sizes = (QUICK if given.quick else OTHERS) | asked
        rates = dict.fromkeys((m.split()[0] for m in METHODS), given.lr or RATE)
    results = measured(given, sizes, rates)
    about = {
        "model": given.model.name, "seeds": given.seeds, "sizes": sizes, "rates": rates,
        "tuning": {"seed": TUNING_SEED, "sizes": TUNING, "loss": searched},
        "published, Llama-2-7B-chat, not measured here": PUBLISHED, "methods": results,
    }  # fmt: skip
    if own and not given.quick:
        titles = {"op": "OP, percent", "bwt": "BWT, percent"}
        orders = {f"order {o}": {m: r[str(o)] for m, r in results.items()} for o in given.order}
        save("trace_scores", about, bars(orders, titles))
    elif not own:
        write_json(given.runs / "trace_scores.json", machine() | about)
    report(given.order, results, about)


def report(orders: Sequence[int], results: Figures, about: Figures) -> None:
    tasks = ORDERS[1]
    each = [
        (name, *(f"{of[str(orders[0])]['by_task'][t]['mean']:.1f}" if t in of[str(orders[0])]["by_task"]
                 else "-" for t in tasks))
        for name, of in results.items()
    ]  # fmt: skip
    print(table(["percent at the end", *tasks], each, f"order {orders[0]}"))
    rows = [
        (name, *(shown(of[str(o)][k]) for o in orders for k in ("op", "bwt")),
         "yes" if of[str(orders[0])]["keeps_data"] else "no",
         f"{sum(of[str(o)]['seconds'] for o in orders):.0f} s")
        for name, of in results.items()
    ]  # fmt: skip
    first = next(iter(results.values()))
    rows.append(("frozen model", *(x for o in orders for x in (shown(first[str(o)]["frozen"]), "-")), "no", "-"))  # fmt: skip
    cited = [
        (n, f"{op:.2f}", "-" if bwt is None else f"{bwt:.2f}") for n, (op, bwt) in PUBLISHED.items()
    ]
    print(table(["method", "OP", "BWT"], cited, "published, Llama-2-7B-chat, not measured here"))
    columns = [f"{k}, order {o}" for o in orders for k in ("OP", "BWT")]
    finish("trace_scores", ["method", *columns, "keeps data", "training"], rows, **about)


if __name__ == "__main__":
    main()
