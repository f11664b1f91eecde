"""Read files that may be damaged, or made to harm: plain files of bounded size, checked JSON and
tensors."""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

LARGEST_JSON = 64 << 20  # bytes
DEEPEST_JSON = 50  # brackets
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """A value that was read, for an error's text: of bounded length."""
    return _SHORT.repr(value)


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
    """Strict JSON: NaN and infinities are refused, 1e999 too, as are brackets that nest too deeply.
    Raises CheckpointError, which begins with `where`."""
    try:
        said = json.loads(text, parse_constant=_finite, parse_float=_finite)
        _require_flat(said)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON ({error})") from None
    return said


def _require_flat(said: Any) -> None:
    """Raise ValueError if lists and dicts nest so deeply that repr() or == could fail on them."""
    level = [said]
    for _ in range(DEEPEST_JSON):
        inner = (x for x in level if isinstance(x, (dict, list)))
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError(f"brackets nest more than {DEEPEST_JSON} deep")


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no number of JSON")
    return float(number)


def parse_tensors(content: bytes, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError, which begins with `where`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise CheckpointError(f"{where}: not a safetensors file ({error})") from None


def require_finite(
    tensors: dict[str, torch.Tensor],
    where: str,
    may_be_infinite: Callable[[str], bool] | None = None,
) -> None:
    """Raise CheckpointError if a tensor holds NaN, or an infinity that it may not hold by its name."""

    def is_odd(name: str, tensor: torch.Tensor) -> bool:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        values = tensor.float() if tensor.itemsize == 1 else tensor  # no isfinite of 8 bits
        if may_be_infinite is not None and may_be_infinite(name):
            return bool(values.isnan().any())
        return not values.isfinite().all()

    odd = [name for name, tensor in tensors.items() if is_odd(name, tensor)]
    if odd:
        raise CheckpointError(
            f"{where}: {', '.join(odd[:3])} {'hold' if len(odd) > 1 else 'holds'} NaN or infinity: "
            "the training that made it diverged, or the file is damaged"
        )
