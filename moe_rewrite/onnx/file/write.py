"""ONNX files, written atomically and tensor by tensor.

Protobuf merges the fields of a message that appears several times. So a file is the graph without
weights, followed by one message for each weight, and at most one weight is copied at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import onnx
import torch

from ...errors import ConfigError
from ...utils.one_writer import one_writer
from ...utils.tensor_bytes import tensor_bytes
from .dtypes import KINDS
from .protobuf import PAGE, FileRange, large, piece

if TYPE_CHECKING:
    from .skeleton import Skeleton

PROTOBUF_LIMIT = 2**31
EMBEDDED = 1_500_000_000  # most bytes of weights in the .onnx file by default


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and contents."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()


def write_model(skeleton: Skeleton, path: Path, external: bool) -> None:
    """Write the .onnx file at `path` and, if `external`, one file of weights beside it. That has
    their hash in its name, so the .onnx file always finds the weights it was written with."""
    ranges: dict[str, FileRange] = {}
    if external:
        data = path.with_name(f"{path.stem}-{digest(skeleton.weights)[:16]}.data")
        ranges = write_data(skeleton.weights, data)
    _write_graph(skeleton, path, ranges)


def _write_graph(skeleton: Skeleton, path: Path, elsewhere: dict[str, FileRange]) -> None:
    """The graph, with the weights that are not `elsewhere`."""
    with open(path, "wb") as file:
        file.write(skeleton.model.SerializeToString())
        for name, tensor in skeleton.weights.items():
            header = onnx.TensorProto(name=name, dims=tensor.shape, data_type=KINDS[tensor.dtype])
            piece(file, header, elsewhere.get(name) or tensor_bytes(tensor))
        _flush(file)


def write_data(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, FileRange]:
    """Write the tensors' bytes one after the other; large ones start at a page."""
    ranges = {}
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            content = tensor_bytes(tensor)
            if large(content.nbytes):
                file.write(bytes(-file.tell() % PAGE))
            ranges[name] = FileRange(path.name, file.tell(), content.nbytes)
            file.write(content)
        _flush(file)
    return ranges


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def checked_path(path: str | os.PathLike) -> Path:
    """Raises ConfigError unless this can be the path of a .onnx file."""
    target = Path(path)
    if target.suffix != ".onnx" or target.is_dir():
        raise ConfigError(f"path={str(path)!r}: expected the name of a file that ends in .onnx")
    return target


@contextmanager
def in_place(target: Path) -> Iterator[Path]:
    """A path to write to, in a temporary folder. On success the files there replace the target and
    its weights; on an error they are deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".moe_rewrite-", dir=target.parent))
    try:
        yield folder / target.name
        made = sorted(folder.iterdir(), key=lambda p: p.name == target.name)  # the .onnx file last
        with one_writer(target.parent):
            for file in made:
                os.chmod(file, 0o644)
                os.replace(file, target.parent / file.name)
            for old in _data_files(target):
                if old.name not in {m.name for m in made}:
                    old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _data_files(target: Path) -> list[Path]:
    name = re.compile(re.escape(target.stem) + r"-[0-9a-f]{16}\.data")
    return [p for p in target.parent.iterdir() if name.fullmatch(p.name)]


def needs_external(tensors: dict[str, torch.Tensor], asked: bool | None) -> bool:
    """Whether to store weights externally. Raises ConfigError if asked=False is impossible."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if asked is False and size >= PROTOBUF_LIMIT - 2**24:
        raise ConfigError(
            f"external_data=False: {size} bytes of weights, and one ONNX file holds less than "
            f"{PROTOBUF_LIMIT}: leave external_data at None"
        )
    return size > EMBEDDED if asked is None else asked


def set_metadata(model: onnx.ModelProto, facts: dict[str, Any]) -> None:
    import json

    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in facts.items()})
