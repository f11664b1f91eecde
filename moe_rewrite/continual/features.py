"""Cache of the features at the cut: the frozen shallow segment runs once a sample."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..converted.model import MoEModel
from ..converted.saving import checkpoint
from ..errors import ConfigError
from ..utils.folders import in_turn, require_writable
from ..utils.read_files import require_plain
from ..utils.tensor_bytes import tensor_bytes
from .digests import config_digest

MASK = "attention_mask"


class FeatureCache:
    """Features at the cut, by a key of the sample's content and the model's weights.

    folder: of a memory-mapped file, which later runs reuse; None keeps the features in memory.
    max_bytes: size at most. When full, further samples are computed each time: in a pass over more
        samples than fit, any that was evicted would be needed again before the new one.

    Raises ConfigError for a wrong `max_bytes`, or a folder that cannot be written to;
    CheckpointError if something else than its files is there.
    """

    def __init__(
        self, moe: MoEModel, folder: str | Path | None = None, max_bytes: int = 2**30
    ) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes!r}: expected an int >= 1")
        self.moe, self.max_bytes = moe, max_bytes
        self.hits = self.misses = 0
        self._model = _fingerprint(moe)
        self._store = _Memory() if folder is None else _Mapped(Path(folder), self._model, max_bytes)

    def __len__(self) -> int:
        return len(self._store.entries)

    def features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, ...) features of a batch of the model's arguments, as `MoEModel.features` returns
        them; zeros at padded positions on the right."""
        lengths = _lengths(inputs)
        count = len(next(iter(inputs.values())))
        keys = [self._key(inputs, i, lengths) for i in range(count)]
        found = {i: self._store.get(key) for i, key in enumerate(keys)}
        missing = [i for i, kept in found.items() if kept is None]
        self.hits, self.misses = self.hits + count - len(missing), self.misses + len(missing)
        if missing:
            made = self.moe.features(**{k: v[missing] for k, v in inputs.items()})
            for row, i in enumerate(missing):
                whole = made[row].detach().cpu()
                found[i] = (whole if lengths is None else whole[: lengths[i]]).contiguous()
                self._keep(keys[i], found[i])
        rows = [row for row in found.values() if row is not None]
        return _stack(rows, inputs, lengths).to(self.moe.device)

    def _keep(self, key: str, row: Any) -> None:
        size = row.numel() * row.element_size()
        if key not in self._store.entries and self._store.used + size <= self.max_bytes:
            self._store.put(key, row)

    def _key(self, inputs: Mapping[str, torch.Tensor], row: int, lengths: list[int] | None) -> str:
        digest = hashlib.sha256(f"{self._model}{_autocast(self.moe.device)}".encode())
        for name, tensor in sorted(inputs.items()):
            one = tensor[row] if lengths is None or tensor.ndim < 2 else tensor[row, : lengths[row]]
            digest.update(f"{name}{tuple(one.shape)}{one.dtype}".encode())
            digest.update(tensor_bytes(one))
        return digest.hexdigest()[:32]


def _autocast(device: torch.device) -> str:
    """The dtype in which products are computed, if it is not the model's."""
    on = torch.is_autocast_enabled(device.type)
    return str(torch.get_autocast_dtype(device.type)) if on else ""


def _fingerprint(moe: MoEModel) -> str:
    """Digest of the dense weights, the configuration, the split and the dtype."""
    facts = [
        checkpoint.fingerprint(moe.reference.state), config_digest(moe.config),
        str(moe.report.split), str(moe.dtype),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _lengths(inputs: Mapping[str, torch.Tensor]) -> list[int] | None:
    """Tokens of each sample if all padding is on the right; None: whole rows are stored."""
    mask = inputs.get(MASK)
    if mask is None or mask.ndim != 2:
        return None
    counts = (mask != 0).sum(1)
    right = (mask != 0) == (torch.arange(mask.shape[1], device=mask.device) < counts[:, None])
    return counts.tolist() if bool(right.all()) and bool((counts > 0).all()) else None


def _stack(
    rows: list[torch.Tensor], inputs: Mapping[str, torch.Tensor], lengths: list[int] | None
) -> torch.Tensor:
    if lengths is None:
        return torch.stack(rows)
    out = rows[0].new_zeros(len(rows), inputs[MASK].shape[1], *rows[0].shape[1:])
    for row, kept in zip(out, rows, strict=True):
        row[: len(kept)] = kept
    return out


class _Memory:
    used = 0

    def __init__(self) -> None:
        self.entries: dict[str, torch.Tensor] = {}

    def get(self, key: str) -> torch.Tensor | None:
        return self.entries.get(key)

    def put(self, key: str, row: torch.Tensor) -> None:
        self.entries[key] = row.clone()
        self.used += row.numel() * row.element_size()


class _Mapped:
    """One flat file, and a line of JSON for each sample in it, written after the sample.

    Several caches, of several processes too, may use the files: each appends in turn, after what
    the others wrote. A line that is malformed, and a sample that does not belong to its line, count
    as absent.
    """

    def __init__(self, folder: Path, model: str, max_bytes: int) -> None:
        require_writable(folder)
        self.index = folder / f"features-{model}.jsonl"
        self.lock = folder / f".features-{model}.lock"
        data = folder / f"features-{model}.bin"
        self.entries: dict[str, dict[str, Any]] = {}
        self.used = self.read = 0  # bytes of the data, and of the index
        for path in (self.index, data):
            if path.exists():
                require_plain(path)
        with in_turn(self.lock):
            if not data.exists() or data.stat().st_size < max_bytes:
                with open(data, "ab") as file:
                    file.truncate(max_bytes)  # a sparse file: uses disk only for what is written
        self.bytes = np.memmap(data, np.uint8, "r+")
        self._read()

    def _read(self) -> None:
        """Take in the lines that were added since."""
        if not self.index.exists():
            return
        with open(self.index, "rb") as file:
            file.seek(self.read)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else ():
            entry = _entry(line)
            if entry is not None:
                self.used = max(self.used, entry["at"] + entry["size"])
                if entry["at"] + entry["size"] <= len(self.bytes):
                    self.entries[entry["key"]] = entry
        self.read += len(whole) + bool(whole)

    def get(self, key: str) -> torch.Tensor | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        raw = np.array(self.bytes[entry["at"] : entry["at"] + entry["size"]])
        if not entry.get("sound"):
            if _checksum(entry, raw.data) != entry["crc"]:
                del self.entries[key]
                return None
            entry["sound"] = True
        return torch.from_numpy(raw).view(getattr(torch, entry["dtype"])).view(entry["shape"])

    def put(self, key: str, row: torch.Tensor) -> None:
        raw = tensor_bytes(row)
        with in_turn(self.lock):
            self._read()
            if key in self.entries or self.used + len(raw) > len(self.bytes):
                return
            self.bytes[self.used : self.used + len(raw)] = raw
            entry = {
                "key": key, "at": self.used, "size": len(raw), "shape": list(row.shape),
                "dtype": str(row.dtype).removeprefix("torch."),
            }  # fmt: skip
            entry["crc"] = _checksum(entry, raw)
            with open(self.index, "a") as file:
                cut = file.tell() > self.read  # in the middle of a line, by a crash
                file.write("\n" * cut + json.dumps(entry) + "\n")
            self._read()
        self.entries[key]["sound"] = True


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the index; None if it is malformed."""
    try:
        entry = json.loads(line)
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        numbers = [entry["at"], entry["size"], entry["crc"], *shape]
        fits = prod(shape) * dtype.itemsize == entry["size"] and isinstance(entry["key"], str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if fits and all(type(n) is int and n >= 0 for n in numbers) else None


def _checksum(entry: dict[str, Any], raw: Any) -> int:
    """Of a sample and of what its line says, so that no line serves another sample."""
    said = json.dumps([entry[k] for k in ("key", "at", "size", "shape", "dtype")])
    return zlib.crc32(raw, zlib.crc32(said.encode()))
