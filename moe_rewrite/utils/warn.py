"""Warnings that point at the line of the user's program."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parents[1]) + os.sep


def warn(message: str) -> None:
    """A UserWarning at the line that called into this package."""
    level, frame = 2, sys._getframe(1)  # of the caller
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
