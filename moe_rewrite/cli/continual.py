"""``moe-rewrite learn`` and ``compare``: methods of learning over a stream of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..errors import ConfigError

Model = Annotated[
    str, typer.Option(help="Hugging Face folder, hub name, or package.module:factory")
]
Tasks = Annotated[
    list[Path],
    typer.Option(
        help="Folders of tasks: prompt/answer or text/label records, TRACE, MNIST or CIFAR-10 files"
    ),
]
More = Annotated[list[Path] | None, typer.Argument(help="Further folders of tasks", hidden=True)]
Split = Annotated[str, typer.Option(help="Where the deep segment starts, as convert takes it")]
Epochs = Annotated[
    int | None, typer.Option(help="Of every task; default: TRACE's own for its tasks, 3 for others")
]
MaxSamples = Annotated[int | None, typer.Option(help="Items of each part of a task at most")]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of checkpoints, tables and pictures; a run in it resumes"),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file")]
ScoreName = Annotated[
    str,
    typer.Option(help="accuracy (of answer tokens, or images), loss (minus it) or task (TRACE's)"),
]
Rank = Annotated[int, typer.Option(help="Rank of experts and adapters")]
Alpha = Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate of experts and adapters")]
BatchSize = Annotated[
    int | None, typer.Option(help="Items a step; default 8 texts, 16 with labels, 32 images")
]
MaxLength = Annotated[int, typer.Option(help="Tokens of an item at most")]
Replay = Annotated[float, typer.Option(help="Share of older items kept by methods that replay")]
Granularity = Annotated[str | None, typer.Option(help="Router: token, prefix or sequence")]
TopK = Annotated[int | None, typer.Option(help="Experts kept per row; default all")]
Base = Annotated[
    Path | None,
    typer.Option(
        help="What the model can do already: a task's or images' folder; default: its own text"
    ),
]
Mean = Annotated[str, typer.Option(help="Subtracted from each channel of images, with commas")]
Std = Annotated[str, typer.Option(help="Each channel of images is divided by, with commas")]
PerTask = Annotated[
    int | None,
    typer.Option(help="Classes of a task; default: 2 of images, all of a folder of labelled texts"),
]
Cache = Annotated[bool, typer.Option(help="Keep features at the cut (pmoe): in --out, or memory")]
Precision = Annotated[str, typer.Option(help="no, bf16 or fp16")]
Patience = Annotated[
    int | None, typer.Option(help="Stop a task after so many epochs without a lower eval loss")
]


def run_methods(
    methods: list[str], *, model: Model, tasks: Tasks, more: More = None, split: Split = "auto",
    epochs: Epochs = None, max_samples: MaxSamples = None, seed: Seed = 0, out: Out = None,
    json_file: Json = None, score: ScoreName = "accuracy", rank: Rank = 8, alpha: Alpha = 16.0,
    lr: Rate = 3e-3, batch_size: BatchSize = None, max_length: MaxLength = 512,
    replay: Replay = 0.2, granularity: Granularity = None, top_k: TopK = None, base: Base = None,
    per_task: PerTask = None, mean: Mean = "0", std: Std = "1", cache: Cache = False,
    mixed_precision: Precision = "no", patience: Patience = None,
) -> None:  # fmt: skip
    from ..continual.compare import compare as compare_methods
    from ..continual.registry import METHODS, Setup
    from ..continual.training import Training
    from .loading import load_model, parse_split
    from .read_tasks import read_tasks, require_folders

    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise ConfigError(f"method {unknown[0]!r}: expected one of {', '.join(METHODS)}")
    training = Training(
        epochs=3 if epochs is None else epochs,
        lr=lr,
        patience=patience,
        seed=seed,
        mixed_precision=cast(Any, mixed_precision),
    )
    folders = [*tasks, *(more or [])]
    require_folders(folders)
    dense = load_model(model)
    problem, stream, base_task = read_tasks(
        dense, model, folders, base, max_samples=max_samples, epochs=epochs, seed=seed,
        max_length=max_length, batch_size=batch_size, per_task=per_task, mean=mean, std=std,
    )  # fmt: skip
    training = replace(training, batch_size=problem.batch_size)
    kept: str | bool = cache and (str(out / "features") if out is not None else True)
    setup = Setup(
        parse_split(split), rank, alpha, granularity, top_k, replay, training=training, cache=kept,
    )  # fmt: skip
    compare_methods(methods, dense, problem, stream, setup, base_task, score, out, json_file)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `run_methods` added to its signature, which typer reads."""
    mine, shared = (signature(f, eval_str=True).parameters.values() for f in (command, run_methods))
    kept = [p for p in mine if p.kind is not p.VAR_KEYWORD]
    kept += [p for p in shared if p.name != "methods"]
    with_signature: Any = command
    with_signature.__signature__ = Signature([p.replace(kind=p.KEYWORD_ONLY) for p in kept])
    return command


@_with_options
def learn(
    method: Annotated[str, typer.Option(help="A method's name; see compare")] = "pmoe",
    **options: Any,
) -> None:
    """Teach a model a stream of tasks, and see what it learns and what it keeps.

    Example: moe-rewrite learn --model ./my-llama --tasks ./TRACE --split 16 --out ./run
    """
    run_methods([method], **options)


@_with_options
def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: pmoe, pmoe-gradient, anyssr, full, lora, replay, ewc, lwf, olora, osf, "
            "arrow, ranpac, oracle, joint"
        ),
    ] = "pmoe,pmoe-gradient,lora,replay,oracle",
    **options: Any,
) -> None:
    """Run several methods over the same stream and compare them.

    Example: moe-rewrite compare --methods pmoe,lora,replay --model ./my-llama --tasks ./TRACE
    """
    run_methods(methods.split(","), **options)
