"""Replay buffer: items of older tasks that are kept."""

from __future__ import annotations

import random
from collections import Counter

from ..errors import ConfigError
from .tasks import Task

ReplayItem = tuple[int, int]  # (task number, index of the training item)


class Buffer:
    """About `ratio` of all training items seen, by task number and index.

    balanced: keep equally many of each task, by dropping from the largest; otherwise a reservoir,
        in which every item seen has the same chance to be kept.
    """

    def __init__(self, ratio: float, balanced: bool, seed: int) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError(f"replay={ratio!r}: expected a share of the items, 0 to 1")
        self.ratio, self.balanced, self.seed = ratio, balanced, seed
        self.kept: list[ReplayItem] = []
        self.seen = 0

    def add(self, number: int, task: Task) -> None:
        """Add a task's training items; the choice depends only on the seed and the task."""
        draw = random.Random(f"{self.seed}/{number}")
        total = self.seen + len(task.train)
        size = max(1, round(self.ratio * total)) if self.ratio else 0
        if self.balanced:
            self.kept += [(number, i) for i in draw.sample(range(len(task.train)), len(task.train))]
            self._balance(size)
        else:
            self.kept += [(number, i) for i in range(len(task.train)) if draw.random() < self.ratio]
        self.seen = total

    def _balance(self, size: int) -> None:
        """Drop the newest items of the largest task until `size` are left."""
        counts = Counter(number for number, _ in self.kept)
        while sum(counts.values()) > size:
            largest = max(counts, key=lambda n: (counts[n], n))
            counts[largest] -= 1
        left: list[ReplayItem] = []
        for kept in self.kept:
            if counts[kept[0]] > 0:
                counts[kept[0]] -= 1
                left.append(kept)
        self.kept = left
