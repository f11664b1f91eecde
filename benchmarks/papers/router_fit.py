"""Routers fitted on the way, in closed form and by gradient, in loops that know nothing of routers."""

# python -m benchmarks.papers.router_fit [--quick]: streams of text (TRACE, stories260K), digits (a
# vision transformer that knows 0 to 5 learns 6-7 and 8-9) and images (a ResNet-20 of CIFAR-10 learns
# MNIST's digits, two a task). A loop is expand(), the optimizer's steps and eval(): no replay, no
# loss on the router, no task identity. The analytic router is told once what the model could do
# before; the others have nothing to be told. A PatchRouter is what a map gets by default.

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from moe_rewrite import LoRAExperts, PatchRouter, TokenRouter, convert

from ..tools.report import finish, is_quick, save
from . import split_digits, trace

CPU = torch.device("cpu")
TEXT = {"tasks": 4, "items": 64, "tested": 24, "stories": 64}
IMAGES = {"tasks": 3, "train": 120, "tested": 400, "base_tested": 200}
# epochs; learning rates by router: those of the streams' own benchmarks
EPOCHS = {"text": 2, "digits": 12, "images": 8}
RATES = {
    "text": {"analytic": 1e-2, "gradient": 3e-2},
    "digits": {"analytic": 3e-3, "gradient": 3e-3},
    "images": {"analytic": 1e-2, "gradient": 1e-2, "patch": 1e-2},
}


@dataclass(frozen=True)
class Stream:
    """score: "loss" or "accuracy". remember: what an analytic model is told, given the model."""

    dense: nn.Module
    problem: Any
    tasks: list[Any]
    base: Any
    score: str
    split: int | str
    granularity: str
    remember: Callable[[Any], None]


def text(quick: bool, **given: int) -> Stream:
    from moe_rewrite.continual.tasks import Task, read_stream

    dense, problem = trace.pretrained()
    sizes = TEXT | ({"tasks": 2, "items": 16, "tested": 8, "stories": 16} if quick else given)
    stream = read_stream([split_digits.data() / "TRACE"])[: sizes["tasks"]]
    tasks = [
        Task(t.name, t.train[: sizes["items"]], t.test[: sizes["tested"]], epochs=1) for t in stream
    ]
    base = problem.base_task_of(dense, 1, sizes["stories"], 7)
    texts = sizes["items"]
    return Stream(
        dense, problem, tasks, base, "loss", trace.SPLIT, "prefix",
        lambda moe: moe.remember(texts=texts),
    )  # fmt: skip


def digits(quick: bool, **given: int) -> Stream:
    from moe_rewrite.continual.images import ImageProblem
    from moe_rewrite.continual.training import Training, adamw, fit
    from moe_rewrite.demo.digits import DigitNet, _tasks

    torch.manual_seed(0)
    known, stream = _tasks(0)
    problem, dense = ImageProblem(32, "image"), DigitNet()
    training = Training(batch_size=32, lr=1e-3)
    fit(
        "dense network", problem, [(0, item) for item in known.train],
        lambda batch, _: problem.loss(dense, batch), [adamw(list(dense.parameters()), training)],
        training, 2 if quick else 15,
    )  # fmt: skip
    return _images_stream(dense.eval(), problem, stream, known, 2)


def images(quick: bool, **given: int) -> Stream:
    from moe_rewrite.continual.images import ImageProblem, items_of, split_classes
    from moe_rewrite.continual.tasks import Task

    small = {"tasks": 2, "train": 32, "tested": 60, "base_tested": 20}
    sizes = IMAGES | (small if quick else given)
    train, tested = sizes["train"], sizes["tested"]
    drawn = split_digits.drawn("mnist", (12 * train, tested), 0, "test")
    stream = split_classes(*drawn, per_task=2, first_column=10, name="digits", limit=train)
    counts = (4 * train, sizes["base_tested"])
    base = split_digits.drawn("cifar-10-batches-py", counts, 0, "test")
    known = Task("CIFAR-10", *(items_of(part, {c: c for c in range(10)}) for part in base))
    dense, problem = split_digits.pretrained(), ImageProblem(32)
    return _images_stream(dense, problem, stream[: sizes["tasks"]], known, "layer3")


def _images_stream(dense: Any, problem: Any, tasks: Any, known: Any, split: Any) -> Stream:
    def remember(moe: Any) -> None:
        moe.remember(problem.inputs(b) for b in problem.batches(known.train, CPU))

    return Stream(dense, problem, tasks, known, "accuracy", split, "sequence", remember)


STREAMS: dict[str, Callable[..., Stream]] = {"text": text, "digits": digits, "images": images}


# -- loops, which know nothing of routers ---------------------------------------------------------


def plain(moe: Any, problem: Any, items: Sequence[Any], epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=lr, weight_decay=0.0)
    moe.train()
    for epoch in range(epochs):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, len(order), problem.batch_size):
            batch = problem.batch([items[i] for i in order[start : start + problem.batch_size]])
            problem.loss(moe, batch).backward()
            nn.utils.clip_grad_norm_(moe.trainable_parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    moe.eval()


def by_trainer(moe: Any, problem: Any, items: Sequence[Any], epochs: int, lr: float) -> None:
    from transformers import Trainer, TrainingArguments

    class ByProblem(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return problem.loss(model, inputs)

    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=epochs, learning_rate=lr, use_cpu=True,
        per_device_train_batch_size=problem.batch_size, save_strategy="no", report_to=[],
        disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    ByProblem(moe, arguments, train_dataset=list(items), data_collator=problem.batch).train()
    moe.eval()


LOOPS = {"plain": plain, "Trainer": by_trainer}


def converted(stream: Stream, router: str, seed: int) -> Any:
    torch.manual_seed(seed)
    asked = {
        "analytic": TokenRouter(granularity=stream.granularity, fit="analytic"),  # type: ignore[arg-type]
        "gradient": TokenRouter(granularity=stream.granularity, fit="gradient"),  # type: ignore[arg-type]
        "patch": PatchRouter(),
    }[router]  # fmt: skip
    problem = stream.problem
    example = problem.inputs(problem.batch(stream.tasks[0].train[:2]))
    return convert(
        stream.dense, split=stream.split, router=asked, experts=LoRAExperts(8),
        example_inputs=example,
    )  # fmt: skip


def job(stream: Stream, router: str, loop: str, epochs: int, lr: float) -> dict[str, Any]:
    problem, moe = stream.problem, converted(stream, router, 0)
    before = problem.score(moe.eval(), stream.base, stream.score, CPU)
    if router == "analytic":
        stream.remember(moe)
    scores, seconds = [], 0.0
    for number, task in enumerate(stream.tasks):
        if number or task.classes:
            moe.expand(1, name=task.name, classes=task.classes)
        start = time.perf_counter()
        LOOPS[loop](moe, problem, task.train, epochs, lr)
        seconds += time.perf_counter() - start
        seen = stream.tasks[: number + 1]
        scores.append([problem.score(moe, t, stream.score, CPU) for t in seen])
    last, sign = scores[-1], -1.0 if stream.score == "loss" else 1.0
    older = [after - scores[i][i] for i, after in enumerate(last[:-1])]
    return {
        "score": stream.score, "last": sign * mean(last), "bwt": mean(older),
        "base_before": sign * before,
        "base": sign * problem.score(moe, stream.base, stream.score, CPU), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    quick = is_quick(__doc__)
    results: dict[str, dict[str, Any]] = {}
    for name in ("text", "digits") if quick else STREAMS:
        stream = STREAMS[name](quick)
        for router, lr in RATES[name].items():
            for loop in ("plain",) if quick or router == "patch" else LOOPS:
                epochs = 1 if quick else EPOCHS[name]
                results[f"{name}, {router}, {loop}"] = job(stream, router, loop, epochs, lr)
    if not quick:
        sizes = {"text": TEXT, "images": IMAGES, "epochs": EPOCHS, "rates": RATES}
        save("router_fit", {"seeds": 1, "sizes": sizes, "results": results})
    shown = ["score", "last", "bwt", "base_before", "base", "seconds"]
    rows = [
        (name, *(v if isinstance(v, str) else f"{v:.3f}" for v in (r[k] for k in shown)))
        for name, r in results.items()
    ]
    finish("router_fit", ["stream, router, loop", *shown], rows, results=results)


if __name__ == "__main__":
    main()
