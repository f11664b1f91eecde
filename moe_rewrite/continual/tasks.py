"""Tasks, and how folders of them are read.

A text task is a folder with train.json, test.json and optionally eval.json, each a list of objects or
one object a line: {"prompt", "answer"} (TRACE's format, arXiv 2310.06762), or {"text", "label"} and
perhaps "text_pair" for classifiers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Item = dict[str, Any]

_FIRST = re.compile(r"[^\s,]")  # first character of a JSON value

# TRACE's own order and epochs (section 4.1 and its training scripts)
TRACE = {
    "C-STANCE": 5, "FOMC": 3, "MeetingBank": 7, "Py150": 5,
    "ScienceQA": 3, "NumGLUE-cm": 5, "NumGLUE-ds": 5, "20Minuten": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task of a stream. Raises ConfigError without training or test items.

    name: of the task.
    train, test, eval: items in the problem's format; eval items are for early stopping.
    epochs: of this task; None for the run's.
    classes: columns that it adds to a classification head; None: none.
    """

    name: str
    train: Sequence[Item]
    test: Sequence[Item]
    eval: Sequence[Item] = ()
    epochs: int | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test", "eval"):
            object.__setattr__(self, part, list(getattr(self, part)))
        for part in ("train", "test"):
            if not getattr(self, part):
                raise ConfigError(f"task {self.name!r}: no {part} items")

    def limited(self, count: int | None) -> Task:
        """A copy with the first `count` items of train, test and eval each; None: all."""
        parts = {part: getattr(self, part)[:count] for part in ("train", "test", "eval")}
        return replace(self, **parts)


def read_stream(
    folders: Iterable[str | Path], max_samples: int | None = None, epochs: int | None = None
) -> list[Task]:
    """The tasks of these folders, in order. In a folder of tasks, TRACE's come first, in TRACE's
    order and with its epochs; others follow by name.

    max_samples: items of train, test and eval each, at most.
    epochs: of every task, instead of TRACE's.

    Raises ConfigError, naming file and record.
    """
    tasks = []
    for folder in task_folders(folders):
        own = TRACE.get(folder.name) if epochs is None else epochs
        tasks.append(Task(folder.name, *_parts(folder, ANSWERS), own).limited(max_samples))
    return tasks


def read_sets(folders: Iterable[str | Path]) -> dict[str, tuple[list[Item], ...]]:
    """The sets of labelled texts in these folders, (train, test, eval) by name, for `class_stream`.

    Raises ConfigError, naming file and record.
    """
    return {f.name: _parts(f, LABELLED) for f in task_folders(folders)}


def task_folders(folders: Iterable[str | Path]) -> list[Path]:
    """The folders of tasks that these are or hold. Raises ConfigError if there are none, or two of
    one name."""
    found: list[Path] = []
    for folder in map(Path, folders):
        found += [folder] if (folder / "train.json").exists() else _tasks_inside(folder)
    if not found:
        raise ConfigError("no task: expected at least one folder with train.json and test.json")
    names = [f.name for f in found]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"two tasks are named {twice!r}: rename one folder")
    return found


def _tasks_inside(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a task or a folder of tasks")
    inside = [f for f in sorted(folder.iterdir()) if (f / "train.json").exists()]
    if not inside:
        raise ConfigError(f"{folder}: no train.json in it, nor in a folder inside it")
    order = list(TRACE)
    return sorted(inside, key=lambda f: order.index(f.name) if f.name in TRACE else len(order))


@dataclass(frozen=True)
class RecordFormat:
    """What the records of a file are. accepts: whether a value is one. words: for the error."""

    accepts: Callable[[Any], bool]
    words: str


def _strings(record: Any, *names: str) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(n), str) for n in names)


def _is_labelled(record: Any) -> bool:
    pair_is_text = _strings(record, "text") and isinstance(record.get("text_pair", ""), str)
    label = record.get("label") if pair_is_text else None
    return isinstance(label, int | str) and not isinstance(label, bool)


ANSWERS = RecordFormat(
    lambda record: _strings(record, "prompt", "answer"), "'prompt' and 'answer' strings"
)
LABELLED = RecordFormat(
    _is_labelled, "a 'text' string and a 'label', an int or a string (and perhaps 'text_pair')"
)


def _parts(folder: Path, wanted: RecordFormat) -> tuple[list[Item], list[Item], list[Item]]:
    """The records of a folder's train, test and, if there, eval."""
    if not (folder / "test.json").exists():
        raise ConfigError(f"{folder}: test.json is missing")
    train, test = (read_records(folder / f"{part}.json", wanted) for part in ("train", "test"))
    held_out = folder / "eval.json"
    return train, test, read_records(held_out, wanted) if held_out.exists() else []


def read_records(file: Path, wanted: RecordFormat = ANSWERS) -> list[Item]:
    """Records of a format: a JSON list, or objects one after the other.

    Raises ConfigError, naming file and line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    listed = text.lstrip().startswith("[")
    try:
        records = json.loads(text) if listed else [record for _, record in _values(text, 0)]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
    wrong = next((n for n, record in enumerate(records) if not wanted.accepts(record)), None)
    if wrong is not None:
        line, _ = next(islice(_values(text, text.index("[") + 1 if listed else 0), wrong, None))
        raise ConfigError(f"{file}, line {line}: expected {wanted.words}")
    return records


def _values(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """(line on which it starts, value) for each JSON value from position `at` on, with or without
    commas between them."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while found := _FIRST.search(text, at):
        line, counted = line + text.count("\n", counted, found.start()), found.start()
        value, at = decoder.raw_decode(text, counted)
        yield line, value
