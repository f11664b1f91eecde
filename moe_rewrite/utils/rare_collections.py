"""Fewer garbage collections while a graph is made, or modules are imported.

A capture makes a hundred thousand objects that live until its end. Python would look through them
again and again, and then through every object of the process, which takes as long as several blocks.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 100_000  # objects made before Python looks for garbage among them
USUAL = 700  # Python's own number at the least; who sets a smaller one wants memory back early
_lock = threading.Lock()
_inside = 0
_usual = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """While any thread is in this context, the process collects garbage seldom. Thresholds that the
    user has set to another end stay: none (0), smaller or larger ones."""
    global _inside, _usual
    with _lock:
        if not _inside:
            _usual = gc.get_threshold()
            if USUAL <= _usual[0] < YOUNG:
                gc.set_threshold(YOUNG, *_usual[1:])
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and gc.get_threshold() == (YOUNG, *_usual[1:]):  # else set by another
                gc.set_threshold(*_usual)
