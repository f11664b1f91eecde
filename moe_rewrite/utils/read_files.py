"""Read files that may be damaged, or made to harm: plain files of bounded size, checked JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

LARGEST_JSON = 64 << 20  # bytes


def read_bytes(path: Path, largest: int | None = None) -> bytes:
    """The content of a plain file. Raises CheckpointError for anything else (a folder, a pipe), an
    unreadable file, or one of more bytes than `largest`."""
    require_plain(path)
    try:
        if largest is not None and path.stat().st_size > largest:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, expected {largest} at most"
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def require_plain(path: Path) -> None:
    """Raise CheckpointError unless it is a plain file: reading a pipe could wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is no plain file")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError."""
    return parse_json(read_bytes(path, LARGEST_JSON), str(path))


def parse_json(text: bytes | str, where: str) -> Any:
    """Strict JSON: NaN and infinities are refused, as are brackets that nest too deeply. Raises
    CheckpointError, which begins with `where`."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON ({error})") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def require_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raise CheckpointError if a tensor holds NaN or an infinity."""
    odd = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if odd:
        raise CheckpointError(
            f"{where}: {', '.join(odd[:3])} {'hold' if len(odd) > 1 else 'holds'} NaN or infinity: "
            "the training that made it diverged, or the file is damaged"
        )
