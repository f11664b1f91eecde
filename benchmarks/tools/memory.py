"""Memory of this process in MB (1e6 bytes), read from Linux's /proc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory_now() -> float:
    return _field("VmRSS")


def peak_memory() -> float:
    """The peak since the start of the process, or since `forget_peak`."""
    return _field("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: Callable[[], Any]) -> tuple[Any, float]:
    """(its result, the peak above the memory in use before)."""
    forget_peak()
    before = memory_now()
    given = run()
    return given, peak_memory() - before


def _field(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6
