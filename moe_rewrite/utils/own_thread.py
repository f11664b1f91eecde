"""A thread of its own for what a trace of this one must not see."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def apart(run: Callable, *args: Any) -> Any:
    """The result of a function in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *args).result()
