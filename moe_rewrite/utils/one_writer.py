"""One writer of a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there writers do not wait
    fcntl = None  # type: ignore[assignment]


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Other writers of this folder wait, in this process and in others; readers do not.

    The lock is on the folder itself: no file is left, and the system drops the lock of a process
    that dies. Some network drives have no locks: there writers do not wait.
    """
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
