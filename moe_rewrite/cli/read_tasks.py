"""Read what ``moe-rewrite learn``, ``compare`` and ``inspect`` are given: the problem, the stream, the
base task, and batches of them.

What the model is decides: a language model learns answers to prompts, a classifier of texts and one of
images learn classes that come after those that their heads have.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..continual.problem import Problem
    from ..continual.tasks import Item, Task

Read = tuple["Problem", "list[Task]", "Task | None"]


@dataclass(frozen=True)
class Asked:
    """The options of the command line that reading takes, as `run_methods` names them."""

    max_samples: int | None
    epochs: int | None
    seed: int
    max_length: int
    batch_size: int | None
    per_task: int | None
    mean: str
    std: str


def read_tasks(
    dense: Any, model: str, folders: list[Path], base: Path | None, **asked: Any
) -> Read:
    """model: the folder or name that its tokenizer is read from. asked: the fields of `Asked`."""
    given = Asked(**asked)
    if hasattr(dense, "generate"):
        return _answers(dense, model, folders, base, given)
    if type(dense).__name__.endswith("ForSequenceClassification"):
        return _labels(dense, model, folders, base, given)
    return _images(dense, folders, base, given)


def require_folders(folders: list[Path]) -> None:
    if absent := [f for f in folders if not f.is_dir()]:
        raise ConfigError(f"{absent[0]}: no such folder; expected a task or a folder of tasks")


def read_calibration(
    dense: Any, model: str, folders: list[Path], base: Path | None, samples: int, **asked: Any
) -> dict[str, Any]:
    """Batches of the base task, if there is one, and of each task, as `inspect` takes them. samples:
    items of each at most. asked: the other fields of `Asked`."""
    from ..continual.calibration import calibration_of

    problem, stream, base_task = read_tasks(
        dense, model, folders, base, max_samples=samples, epochs=None, seed=0, batch_size=None, **asked
    )  # fmt: skip
    tasks = stream if base_task is None else [base_task, *stream]
    return calibration_of(problem, tasks, samples)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _length(dense: Any, asked: Asked) -> int:
    longest = getattr(dense.config, "max_position_embeddings", None) or asked.max_length
    return min(asked.max_length, longest)


def _answers(dense: Any, model: str, folders: list[Path], base: Path | None, asked: Asked) -> Read:
    from ..continual.tasks import read_stream
    from ..continual.text import TextProblem

    stream = read_stream(folders, asked.max_samples, asked.epochs)
    problem = TextProblem(_tokenizer(model), _length(dense, asked), asked.batch_size or 8)
    if base is not None:
        return problem, stream, replace(read_stream([base], asked.max_samples)[0], epochs=None)
    count = min(300, asked.max_samples or 300)
    return problem, stream, problem.base_task_of(dense, count, min(64, count), asked.seed)


def _labels(dense: Any, model: str, folders: list[Path], base: Path | None, asked: Asked) -> Read:
    from ..continual.classification import ClassificationProblem, class_stream
    from ..continual.tasks import Task, read_sets

    columns = dense.config.num_labels
    stream = class_stream(read_sets(folders), columns, asked.per_task)
    problem = ClassificationProblem(
        _tokenizer(model), _length(dense, asked), asked.batch_size or 16
    )
    base_task = None
    if base is not None:
        name, (train, test, _) = next(iter(read_sets([base]).items()))
        train, test = (_with_columns(name, part, dense.config) for part in (train, test))
        base_task = _fewer(Task(name, train, test), asked.max_samples)
    return problem, [_fewer(t, asked.max_samples) for t in stream], base_task


def _with_columns(name: str, items: list[Item], config: Any) -> list[Item]:
    """The items with their labels as columns of the head; names are looked up in `label2id`."""
    known = dict(config.label2id or {})
    made = []
    for item in items:
        column = known.get(item["label"], item["label"])
        if not isinstance(column, int) or not 0 <= column < config.num_labels:
            raise ConfigError(
                f"base task {name!r}, label {item['label']!r}: expected one that the model has, "
                f"0 to {config.num_labels - 1} or one of {', '.join(known)}"
            )
        made.append({**item, "label": column})
    return made


def _fewer(task: Task, count: int | None) -> Task:
    """`count` items of each part, of every class as many as of the others: files may be sorted."""
    if count is None:
        return task
    train, test, evaluated = (_even(part, count) for part in (task.train, task.test, task.eval))
    return replace(task, train=train, test=test, eval=evaluated)


def _even(items: Any, count: int) -> list[Item]:
    seen: Counter[Any] = Counter()
    turns = []
    for item in items:
        seen[item["label"]] += 1
        turns.append(seen[item["label"]])
    order = sorted(range(len(turns)), key=turns.__getitem__)  # stable: by turn, then as in the file
    return [items[i] for i in sorted(order[:count])]


def _images(dense: Any, folders: list[Path], base: Path | None, asked: Asked) -> Read:
    import inspect

    from ..continual.images import ImageProblem, fit_images, items_of, read_images, split_classes
    from ..continual.tasks import Task
    from ..frontend.choose_host import host_of
    from .loading import parse_numbers

    name, leaf = next(iter(host_of(dense).arguments(None).items()))
    if leaf.ndim != 4:
        takes = ", ".join(inspect.signature(dense.forward).parameters)
        raise ConfigError(
            f"the model takes {takes}: expected a language model, one of images, or a classifier "
            "of texts (...ForSequenceClassification)"
        )
    shape, scale = tuple(leaf.shape[1:]), (parse_numbers(asked.mean), parse_numbers(asked.std))
    per_task, limit = 2 if asked.per_task is None else asked.per_task, asked.max_samples
    columns = int(_logits(dense, leaf).shape[-1])
    stream: list[Task] = []
    first = columns
    for folder in folders:
        train, test = (fit_images(i.limited(limit), shape, *scale) for i in read_images(folder))
        made = split_classes(train, test, per_task, first, folder.name, limit)
        stream += made
        first += per_task * len(made)
    base_task = None
    if base is not None:
        train, test = (fit_images(i.limited(limit), shape, *scale) for i in read_images(base))
        same = {c: c for c in range(columns)}
        base_task = Task("base", items_of(train, same)[:limit], items_of(test, same)[:limit])
    return ImageProblem(asked.batch_size or 32, name), stream, base_task


def _logits(dense: Any, leaf: Any) -> Any:
    import torch

    with torch.no_grad():
        out = dense(leaf)
    return getattr(out, "logits", out)
