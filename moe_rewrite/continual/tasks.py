"""Tasks, and how folders of them are read.

A text task is a folder with train.json, test.json and optionally eval.json, each a list of
{"prompt", "answer"} objects (TRACE's format, arXiv 2310.06762) or one object a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
    found: list[Path] = []
    for folder in map(Path, folders):
        found += [folder] if (folder / "train.json").exists() else _tasks_inside(folder)
    if not found:
        raise ConfigError("no task: expected at least one folder with train.json and test.json")
    names = [f.name for f in found]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"two tasks are named {twice!r}: rename one folder")
    return [_read_task(f, epochs).limited(max_samples) for f in found]


def _tasks_inside(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a task or a folder of tasks")
    inside = [f for f in sorted(folder.iterdir()) if (f / "train.json").exists()]
    if not inside:
        raise ConfigError(f"{folder}: no train.json in it, nor in a folder inside it")
    order = list(TRACE)
    return sorted(inside, key=lambda f: order.index(f.name) if f.name in TRACE else len(order))


def _read_task(folder: Path, epochs: int | None) -> Task:
    if not (folder / "test.json").exists():
        raise ConfigError(f"{folder}: test.json is missing")
    parts: dict[str, Any] = {
        part: read_records(folder / f"{part}.json")
        for part in ("train", "test", "eval")
        if (folder / f"{part}.json").exists()
    }
    return Task(folder.name, **parts, epochs=TRACE.get(folder.name) if epochs is None else epochs)


def read_records(file: Path) -> list[Item]:
    """Records with prompt and answer strings: a JSON list, or objects one after the other.

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
    wrong = next((n for n, record in enumerate(records) if not _is_record(record)), None)
    if wrong is not None:
        line, _ = next(islice(_values(text, text.index("[") + 1 if listed else 0), wrong, None))
        raise ConfigError(f"{file}, line {line}: expected 'prompt' and 'answer' strings")
    return records


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(k), str) for k in ("prompt", "answer")
    )


def _values(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """(line on which it starts, value) for each JSON value from position `at` on, with or without
    commas between them."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while found := _FIRST.search(text, at):
        line, counted = line + text.count("\n", counted, found.start()), found.start()
        value, at = decoder.raw_decode(text, counted)
        yield line, value
