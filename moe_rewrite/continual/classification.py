"""Text classifiers with growing heads (encoders with a classification head), and streams of tasks of
a few classes each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import torch

from ..errors import ConfigError
from .digests import tokenizer_facts
from .problem import Batch, Model, Problem
from .tasks import Task

Items = Iterable[Mapping[str, Any]]
ENCODED = ("input_ids", "token_type_ids", "attention_mask")  # of what a tokenizer returns


class ClassificationProblem(Problem):
    """Items are {"text", "label"} or, for pairs of texts, {"text", "text_pair", "label"}: mappings,
    such as the rows of a `datasets.Dataset`. The label is a column of the head, an int from 0 on.

    tokenizer: of the model.
    max_length: most tokens of an item; a longer text loses its end, of a pair the longer one.
    batch_size: items a step.
    text, text_pair, label: the names that items have for these; an item without `text_pair` is one
        text.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = 128, batch_size: int = 16, text: str = "text",
        text_pair: str = "text_pair", label: str = "label",
    ) -> None:  # fmt: skip
        if not isinstance(max_length, int) or max_length < 1:
            raise ConfigError(f"max_length={max_length!r}: expected an int >= 1")
        self.tokenizer, self.max_length, self.batch_size = tokenizer, max_length, batch_size
        self.text, self.text_pair, self.label = text, text_pair, label
        padding = getattr(tokenizer, "pad_token_id", None)
        self.padding = {"input_ids": 0 if padding is None else padding}

    def facts(self) -> dict[str, Any]:
        return super().facts() | tokenizer_facts(
            self.tokenizer, lambda probe: self._encode({self.text: probe, self.text_pair: probe})
        )

    def batch(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """What the tokenizer returns, (B, S) int64, padded on the right, and labels (B,) int64.

        Raises ConfigError for an item without a text or a label.
        """
        labels = torch.tensor([self._label(item) for item in items])
        encoded = [self._encode(item) for item in items]
        length = max(len(e["input_ids"]) for e in encoded)
        made = {}
        for name in encoded[0]:
            made[name] = torch.full((len(items), length), self.padding.get(name, 0))
            for row, one in zip(made[name], encoded, strict=True):
                row[: len(one[name])] = torch.tensor(one[name])
        return made | {"labels": labels}

    def _encode(self, item: Mapping[str, Any]) -> dict[str, list[int]]:
        texts = [self._string(item, self.text)]
        if item.get(self.text_pair) is not None:
            texts.append(self._string(item, self.text_pair))
        told = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        made = {k: list(told[k]) for k in ENCODED if k in told}
        return made | {"attention_mask": [1] * len(made["input_ids"])}

    def _string(self, item: Mapping[str, Any], name: str) -> str:
        if name not in item:
            raise ConfigError(
                f"an item has no {name!r} but {', '.join(item)}: name the column of its text, "
                f"ClassificationProblem(text=...)"
            )
        if not isinstance(item[name], str):
            raise ConfigError(f"{name!r} of an item is {item[name]!r}: expected a string")
        return item[name]

    def _label(self, item: Mapping[str, Any]) -> int:
        if self.label not in item:
            raise ConfigError(
                f"an item has no {self.label!r} but {', '.join(item)}: name the column of its "
                "label, ClassificationProblem(label=...)"
            )
        label = item[self.label]
        column = index(label) if hasattr(label, "__index__") else -1  # also of numpy and torch
        if column < 0:
            raise ConfigError(
                f"label {label!r} of {str(item.get(self.text))[:40]!r}: expected a column of the "
                "head, an int >= 0; `class_stream` numbers labels of other kinds, and items of a "
                "test set that was published without labels (-1) cannot be scored"
            )
        return column

    def predict(self, model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return model(**self.inputs(batch)).logits, batch["labels"]


def class_stream(
    sets: Mapping[str, tuple[Items, ...]],
    first_column: int,
    per_task: int | None = None,
    label: str = "label",
) -> list[Task]:
    """Tasks of named sets of items, each (train, test) or (train, test, eval): each set is a task with
    the classes of its own labels, or is split into tasks of `per_task` classes each, in the order of
    labels.

    first_column: number of columns that the head has already; the tasks' columns come after them.
    label: the name that items have for their label, an int or a string; in the tasks it is the
        column.

    Raises ConfigError for labels that do not divide, or labels of test or eval items that no training
    item has.
    """
    tasks: list[Task] = []
    for name, parts in sets.items():
        train, test, held_out = (list(part) for part in (*parts, ())[:3])
        classes = sorted(_labels(name, train, label))
        if unknown := _labels(name, [*test, *held_out], label) - set(classes):
            raise ConfigError(
                f"{name!r}: no training item has the label {min(unknown)!r} of a test item"
            )
        size = len(classes) if per_task is None else per_task
        if size < 1 or len(classes) % size:
            raise ConfigError(
                f"{name!r}: {len(classes)} classes do not divide into per_task={per_task!r}"
            )
        for start in range(0, len(classes), size):
            chosen = classes[start : start + size]
            column = {c: first_column + i for i, c in enumerate(chosen)}
            mine, tested, evaluated = (
                [{**item, label: column[item[label]]} for item in part if item[label] in column]
                for part in (train, test, held_out)
            )
            title = name if size == len(classes) else f"{name} {', '.join(map(str, chosen))}"
            tasks.append(Task(title, mine, tested, evaluated, classes=size))
            first_column += size
    return tasks


def _labels(name: str, items: Sequence[Mapping[str, Any]], label: str) -> set[Any]:
    found = {item.get(label) for item in items}
    if len({type(value) for value in found}) > 1 or None in found:
        raise ConfigError(
            f"{name!r}: labels {sorted(map(repr, found))[:5]}: expected every item to have a "
            f"{label!r}, an int or a string"
        )
    return found
