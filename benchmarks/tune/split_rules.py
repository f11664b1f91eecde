"""A rule for ``split="auto"`` that weighs how well tasks are told apart against what is left to adapt."""

# python -m benchmarks.tune.split_rules [--quick]: the first deep block k with the largest
# log(accuracy[k]) + weight * log(after[k]): tasks told apart by a router in closed form at the cut, and
# the share of the parameters after it (`SplitCurve`). The weight is chosen on four small streams that
# are not those of `benchmarks.tune.splits`, at every split at a block: new digits for a small vision
# transformer and for a small ResNet, turned digits as new classes, and recipes, counting and Spanish
# for a decoder that tells stories. The one with the least mean regret is taken (points of accuracy
# behind the best split; the middle one of equals), and is then judged once on the scores and curves in
# results/splits.json. The form of the rule was thought of when those were known; its weight was not.

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..papers.streams import runs, spread
from ..tools.report import finish, is_quick, mean_and_spread, read, save

WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STREAMS = {"digits": 6, "turned": 6, "network": 6, "language": 6}  # blocks
SEEDS = (0, 1, 2)
SAMPLES = 32
KNOWN = 6  # digits that a network knows
Stream = tuple[Any, Any, list[Any], Any]  # model, problem, tasks, base task


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits, (1797, 1, 8, 8) from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    return pixels, torch.tensor(data.target)


def _halves(seed: int, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    """Images to train on, and others."""
    from moe_rewrite.continual.images import Images

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(order) * 2 // 3
    train, test = order[:cut], order[cut:]
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


def _of(images: Any, wanted: Sequence[int], more: int = 0) -> list[Any]:
    """Items of these digits, labelled by their place in `wanted`, from `more` on."""
    from moe_rewrite.continual.images import items_of

    return items_of(images, {digit: more + i for i, digit in enumerate(wanted)})


def _fitted(dense: Any, problem: Any, task: Any, epochs: int, seed: int, lr: float = 3e-3) -> Any:
    from moe_rewrite.continual.training import Training, adamw, fit

    training = Training(epochs=epochs, batch_size=32, lr=lr, seed=seed)
    fit(
        "dense network", problem, [(0, item) for item in task.train],
        lambda batch, task_ids: problem.loss(dense, batch), [adamw(list(dense.parameters()), training)],
        training, epochs,
    )  # fmt: skip
    return dense.eval()


def digits(seed: int, items: int, epochs: int) -> Stream:
    """A vision transformer that knows six digits learns two and two more."""
    from moe_rewrite.demo.digits import DigitNet

    return _new_digits(DigitNet(64, STREAMS["digits"]), seed, items, epochs, lambda x: x, "image")


def network(seed: int, items: int, epochs: int) -> Stream:
    """A ResNet, of images twice as large in three channels, does."""
    from moe_rewrite.models.resnet import ResNet

    def larger(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, 3, -1, -1)

    return _new_digits(ResNet(14, classes=KNOWN), seed, items, epochs, larger, "x")


def _new_digits(dense: Any, seed: int, items: int, epochs: int, form: Any, argument: str) -> Stream:
    from moe_rewrite.continual.images import ImageProblem
    from moe_rewrite.continual.tasks import Task

    pixels, labels = _images()
    train, test = _halves(seed, form(pixels), labels)
    problem, known = ImageProblem(32, argument), list(range(KNOWN))
    base = Task("known", _of(train, known), _of(test, known))
    stream = [
        Task(f"{a}-{b}", _of(train, (a, b), a)[:items], _of(test, (a, b), a), classes=2)
        for a, b in ((6, 7), (8, 9))
    ]
    return _fitted(dense, problem, base, epochs, seed), problem, stream, base.limited(200)


def turned(seed: int, items: int, epochs: int) -> Stream:
    """A vision transformer that knows upright digits learns turned and upside down ones as classes of
    their own."""
    from moe_rewrite.continual.images import ImageProblem
    from moe_rewrite.continual.tasks import Task
    from moe_rewrite.demo.digits import DigitNet

    pixels, labels = _images()
    problem, every = ImageProblem(32, "image"), list(range(10))
    forms = {"upright": pixels, "turned": pixels.rot90(1, (2, 3)), "fallen": pixels.flip(2)}
    tasks = []
    for number, (name, x) in enumerate(forms.items()):
        train, test = _halves(seed, x, labels)
        parts = (_of(images, every, 10 * number) for images in (train, test))
        tasks.append(Task(name, *parts, classes=10 if number else None))
    base, *stream = tasks
    dense = _fitted(DigitNet(64, STREAMS["turned"], classes=10), problem, base, epochs, seed)
    return dense, problem, [t.limited(4 * items) for t in stream], base.limited(200)


def language(seed: int, items: int, epochs: int) -> Stream:
    """A decoder that tells stories learns recipes, counting and Spanish."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from moe_rewrite.continual.text import TextProblem
    from moe_rewrite.demo.language import NEW
    from moe_rewrite.demo.texts import Words, task

    words = Words()
    problem, stories = TextProblem(words, 64, 32), task("stories", 200 * epochs, 60, seed)
    config = LlamaConfig(
        vocab_size=len(words.words), hidden_size=64, intermediate_size=128,
        num_hidden_layers=STREAMS["language"], num_attention_heads=4, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    dense = _fitted(LlamaForCausalLM(config), problem, stories, 2, seed)
    stream = [task(kind, items, 60, seed) for kind in NEW]
    return dense, problem, stream, stories.limited(200)


@cache
def stream_of(stream: str, seed: int, items: int, epochs: int) -> Stream:
    torch.manual_seed(seed)
    return globals()[stream](seed, items, epochs)


def job(
    folder: Path, seed: int, stream: str, items: int, base_epochs: int, epochs: int,
    split: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """PMoE over a stream, cut before a block; or without a split, the curve."""
    import moe_rewrite
    from moe_rewrite.continual import calibration_of
    from moe_rewrite.continual.registry import Setup
    from moe_rewrite.continual.run import run
    from moe_rewrite.continual.training import Training

    dense, problem, tasks, base = stream_of(stream, seed, items, base_epochs)
    if split is None:
        batches = calibration_of(problem, [base, *tasks], SAMPLES)
        example = next(iter(batches.values()))[0]
        curve = moe_rewrite.inspect(dense, example, calibration=batches).curve
        assert curve is not None
        points = [{"accuracy": p.accuracy, "after": p.after} for p in curve.points]
        return {"points": points, "chosen": curve.split}
    training = Training(epochs=epochs, lr=3e-3, batch_size=16, seed=seed)
    setup = Setup(split=split, training=training)
    return run("pmoe", dense, problem, tasks, setup, base, "accuracy", folder).figures()


def chosen(points: Sequence[Mapping[str, float]], weight: float, blocks: int) -> int:
    """The block that the rule cuts before, of the first `blocks`."""

    def worth(point: Mapping[str, float]) -> float:
        return math.log(max(point["accuracy"], 1e-9)) + weight * math.log(max(point["after"], 1e-9))

    return max(range(blocks), key=lambda k: worth(points[k]))


def regret(
    curves: Sequence[Mapping[str, Any]], scores: Mapping[int, Sequence[float]], weight: float | None,
    best: int, lower: bool = False,
) -> list[float]:  # fmt: skip
    """How much the best split is better than the rule's, by seed: in accuracy, or as a share of the
    loss. weight: None: today's rule."""
    found = []
    for seed, curve in enumerate(curves):
        today = curve["chosen"] if "chosen" in curve else curve["split"]
        split = today if weight is None else chosen(curve["points"], weight, len(scores))
        own, theirs = scores[split][seed], scores[best][seed]
        found.append((own - theirs) / theirs if lower else theirs - own)
    return found


def results_of(quick: bool) -> dict[str, dict[str, Any]]:
    """Scores by split and curves by seed, of each stream."""
    sizes = {"items": 16, "base_epochs": 1, "epochs": 1}
    if not quick:
        sizes = {"items": 64, "base_epochs": 12, "epochs": 10}
    asked: dict[str, dict[str, Any]] = {}
    for stream, blocks in list(STREAMS.items())[: 1 if quick else None]:
        of = {"stream": stream, **sizes}
        asked[f"{stream} curve"] = of
        asked |= {f"{stream} {k}": of | {"split": k} for k in range(2 if quick else blocks)}
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            found = {n: [job(Path(folder, n), 0, **options)] for n, options in asked.items()}
    else:
        found = runs(job, asked, SEEDS, workers=1)  # a process trains a network once
    results: dict[str, dict[str, Any]] = {}
    for name, figures in found.items():
        stream, _, kind = name.partition(" ")
        of_stream = results.setdefault(stream, {"scores": {}})
        if kind == "curve":
            of_stream["curves"] = figures
        else:
            of_stream["scores"][int(kind)] = [f["op"] for f in figures]
    return results


def best_of(scores: Mapping[int, Sequence[float]], lower: bool = False) -> int:
    return max(scores, key=lambda k: mean(scores[k]) * (-1 if lower else 1))


def judged(weight: float) -> dict[str, dict[str, Any]]:
    """The regret of a weight on the streams of `benchmarks.tune.splits`, by their saved results."""
    found = {}
    for stream, of in (read("splits") or {"streams": {}})["streams"].items():
        scores = {int(k): v for k, v in of["each"]["scores"].items()}
        curves, lower = of["each"]["curves"]["all"], stream == "text"
        best = best_of(scores, lower)
        found[stream] = {
            "best": best, "splits": [chosen(c["points"], weight, len(scores)) for c in curves],
            "behind": spread(regret(curves, scores, weight, best, lower)),
            "today": spread(regret(curves, scores, None, best, lower)),
        }  # fmt: skip
    return found


def main() -> None:
    quick = is_quick(__doc__)
    results = results_of(quick)
    behind = {
        weight: {
            stream: spread(regret(of["curves"], of["scores"], weight, best_of(of["scores"])))
            for stream, of in results.items()
        }
        for weight in (None, *WEIGHTS)
    }
    means = {w: mean(f["mean"] for f in of.values()) for w, of in behind.items() if w is not None}
    equal = [w for w, value in means.items() if value <= min(means.values()) + 1e-9]
    weight = equal[len(equal) // 2]
    rows = [
        ("today's" if w is None else f"{w:g}", *(mean_and_spread(f) for f in of.values()))
        for w, of in behind.items()
    ]
    figures = {
        "weight": weight, "streams": results, "behind": {str(w): of for w, of in behind.items()},
        "judged": {} if quick else judged(weight),
    }  # fmt: skip
    if not quick:
        save("split_rules", {"seeds": len(SEEDS), **figures})
    finish("split_rules", ["weight", *results], rows, **figures)


if __name__ == "__main__":
    main()
