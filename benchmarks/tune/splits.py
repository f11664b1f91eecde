"""Every split of three streams, and the one that ``split="auto"`` chooses by calibration batches."""

# python -m benchmarks.tune.splits [--quick]: PMoE learns TRACE text (stories260K), digits after
# CIFAR-10 (ResNet-20) and sets of texts (MiniLM-L6), smaller than in `benchmarks.papers`, at every
# split at a block. Beside it, what `moe_rewrite.inspect(calibration=...)` measures on up to 32 training
# items of the base task and each task ("all"), and of the base task and the first task only, which are
# known when a stream begins ("first"). The rule and its margin, `SplitCurve.chosen`, were written down
# before any score here was seen.

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..papers import encoder_stream, split_digits, trace
from ..papers.streams import runs, spread, tuned
from ..tools.plots import subplots
from ..tools.report import finish, is_quick, mean_and_spread, save

STREAMS: dict[str, Any] = {"text": trace, "digits": split_digits, "encoder": encoder_stream}
BLOCKS = {"text": 5, "digits": 9, "encoder": 6}
SEEDS = (0, 1)
SIZES: dict[str, dict[str, Any]] = {
    "text": {"items": 32, "tested": 16, "tasks": 4},
    "digits": {"train": 64, "tested": 300, "base_tested": 60, "tasks": 3},
    "encoder": {"train": 32, "tested": 40, "base": 60, "base_tested": 20},
}
EPOCHS = {"text": 2, "digits": 4, "encoder": 3}
QUICK_SIZES: dict[str, dict[str, Any]] = {"text": {"items": 8, "tested": 2, "tasks": 2}}
SAMPLES = 32
KNOWN = ("all", "first")
GOAL = 0.005


def job(
    folder: Path, seed: int, stream: str, epochs: int, sizes: dict[str, Any],
    split: int | None = None, known: str = "",
) -> dict[str, Any]:  # fmt: skip
    """PMoE over a stream, cut before a block; or without a split, the curve of what is known."""
    if split is None:
        return measured(seed, stream, epochs, sizes, known)
    options = {"method": "pmoe", "epochs": epochs, **sizes}
    if stream == "encoder":
        return encoder_stream.job(folder, seed, lr=3e-3, first_deep=split, **options)
    lr = trace.RATES["pmoe"] if stream == "text" else tuned()["rates"]["pmoe"]
    return STREAMS[stream].job(folder, seed, lr=lr, split=split, **options)


def measured(
    seed: int, stream: str, epochs: int, sizes: dict[str, Any], known: str
) -> dict[str, Any]:
    """The curve of the tasks that are known, and half of the FLOPs."""
    import moe_rewrite
    from moe_rewrite.continual import calibration_of

    of_epochs = {} if stream == "digits" else {"epochs": epochs}
    dense, problem, tasks, base = STREAMS[stream].stream_of(seed, **sizes, **of_epochs)
    tasks = tasks if known == "all" else tasks[:1]
    batches = calibration_of(problem, [base, *tasks], SAMPLES)
    start = time.perf_counter()
    depth = moe_rewrite.inspect(dense, next(iter(batches.values()))[0], calibration=batches)
    seconds, curve = time.perf_counter() - start, depth.curve
    assert curve is not None
    points = [{"accuracy": p.accuracy, "error": p.error, "after": p.after} for p in curve.points]
    half, _ = depth.measured(None).resolve("auto")
    return {"split": curve.split, "half": half, "points": points, "seconds": seconds}


def summary(
    found: Mapping[int, list[dict[str, Any]]],
    curves: Mapping[str, list[dict[str, Any]]],
    text: bool,
) -> dict[str, Any]:
    """Scores by split; of each rule, what its splits score, and by how much the best split is better:
    in accuracy, or as a share of the loss."""
    sign = -1 if text else 1
    scores = {split: [sign * f["op"] for f in figures] for split, figures in found.items()}
    base = {split: [sign * f["base_after"] for f in figures] for split, figures in found.items()}
    best = max(scores, key=lambda split: sign * mean(scores[split]))
    rules = {known: [c["split"] for c in each] for known, each in curves.items()}
    rules["half"] = [c["half"] for c in curves["all"]]
    of_rules = {}
    for rule, splits in rules.items():
        theirs = [scores[split][seed] for seed, split in enumerate(splits)]
        behind = [
            sign * (b - x) / (b if text else 1) for b, x in zip(scores[best], theirs, strict=True)
        ]
        of_rules[rule] = {
            "splits": splits, "score": spread(theirs), "behind": spread(behind),
            "within": mean(behind) <= GOAL,
        }  # fmt: skip
    by_split = {
        split: {
            "score": spread(scores[split]), "base": spread(base[split]),
            **{k: spread([c["points"][split]["accuracy"] for c in each]) for k, each in curves.items()},
        }
        for split in scores
    }  # fmt: skip
    each = {"curves": curves, "scores": scores}
    return {"best": best, "rules": of_rules, "by_split": by_split, "each": each}


def picture(results: Mapping[str, dict[str, Any]]) -> Any:
    """A column a stream: its score by split above, how well its tasks are told apart below."""
    figure, grid = subplots(2, len(results), (4.0 * len(results), 5.6), squeeze=False, sharex="col")
    for (above, below), (stream, found) in zip(grid.T, results.items(), strict=True):
        for axis, lines in ((above, ("score",)), (below, KNOWN)):
            for line in lines:
                points = [of[line] for of in found["by_split"].values()]
                means, spreads = ([p[k] for p in points] for k in ("mean", "spread"))
                axis.errorbar(
                    list(found["by_split"]), means, spreads, marker="o", capsize=2, label=line
                )
            for split in set(found["rules"]["all"]["splits"]):
                axis.axvline(split, color="black", linewidth=0.8)
        above.set_title(f"{stream}: {'loss' if stream == 'text' else 'accuracy'}", fontsize=9)
        below.set(xlabel="first deep block", title="tasks told apart")
        below.legend(fontsize=7)
    return figure


def results_of(quick: bool) -> dict[str, dict[str, Any]]:
    asked: dict[str, dict[str, Any]] = {}
    for stream, sizes in (QUICK_SIZES if quick else SIZES).items():
        of = {"stream": stream, "epochs": 1 if quick else EPOCHS[stream], "sizes": sizes}
        asked |= {f"{stream} {known}": of | {"known": known} for known in KNOWN}
        asked |= {f"{stream} {split}": of | {"split": split} for split in range(BLOCKS[stream])}
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            found = {n: [job(Path(folder, n), 0, **options)] for n, options in asked.items()}
    else:
        found = runs(job, asked, SEEDS, workers=1)  # a process trains the encoder once
    return {
        stream: summary(
            {split: found[f"{stream} {split}"] for split in range(BLOCKS[stream])},
            {known: found[f"{stream} {known}"] for known in KNOWN}, stream == "text",
        )
        for stream in (QUICK_SIZES if quick else SIZES)
    }  # fmt: skip


def main() -> None:
    quick = is_quick(__doc__)
    results = results_of(quick)
    if not quick:
        about = {
            "seeds": len(SEEDS),
            "sizes": SIZES,
            "epochs": EPOCHS,
            "samples": SAMPLES,
            "goal": GOAL,
        }
        save("splits", about | {"streams": results}, picture(results))
    rows = [
        (stream, split, *(mean_and_spread(of[k]) for k in ("score", "base", *KNOWN)))
        for stream, found in results.items()
        for split, of in found["by_split"].items()
    ]
    columns = ["stream", "split", "loss or accuracy", "base task", "all told apart", "first, base"]
    shown = {s: {k: v for k, v in found.items() if k != "each"} for s, found in results.items()}
    finish("splits", columns, rows, streams=shown)


if __name__ == "__main__":
    main()
