"""Folders that are written for long: checked before, and used by one process at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows: there folders are not locked
    fcntl = None  # type: ignore[assignment]


def require_writable(folder: Path) -> None:
    """Make the folder. Raises ConfigError where that, or a file in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error})") from None


def require_place(folder: str | os.PathLike) -> Path:
    """The place of a folder to write, which may be there already. Raises ConfigError if a file has its
    name, or nothing can be written there."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{folder}: is no folder; choose another")
    require_writable(target if target.exists() else target.parent)
    return target


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and other runs of this one, out of a folder. The system drops the lock
    of a process that dies. Raises ConfigError if the folder is in use or cannot be written to."""
    require_writable(folder)
    with _lock_file(folder / ".lock") as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another run is using it: wait for its end, or choose another folder"
            ) from None
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process, or user of this file, at a time; the others wait. Raises ConfigError if the file
    cannot be made."""
    with _lock_file(path) as file:
        _lock(file, wait=True)
        yield


def _lock_file(path: Path) -> IO[str]:
    if path.exists() and not path.is_file():  # opening a pipe could wait for ever
        raise ConfigError(f"{path}: is no plain file: remove it")
    try:
        return open(path, "a")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written to ({error})") from None


def _lock(file: IO[str], wait: bool) -> None:
    """Raises BlockingIOError if another holds the lock and `wait` is false. Some network drives have
    no locks: there it does nothing."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass
