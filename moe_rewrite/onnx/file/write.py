"""ONNX files that are whole or not there, written tensor by tensor.

A protobuf message may come in pieces: fields of a message that appears twice are merged. So a
file is the graph without weights, followed by one piece for each weight, and no more than one
weight is ever copied.
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
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import onnx
import torch

from ...errors import ConfigError

if TYPE_CHECKING:
    from ..translate import Skeleton

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto, TensorProto
PAGE = 4096  # bytes from which a weight is large: it begins at an offset that can be mapped
PROTOBUF_LIMIT = 2**31
EMBEDDED = 1_500_000_000  # bytes of weights that stay in the .onnx file unless told otherwise
KINDS = {
    torch.float32: onnx.TensorProto.FLOAT, torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64, torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16, torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8, torch.bool: onnx.TensorProto.BOOL,
}  # fmt: skip


class Place(NamedTuple):
    """Where the bytes of a weight lie: the name of a file, and offset and length in bytes."""

    file: str
    offset: int
    length: int

    def mark(self, tensor: onnx.TensorProto) -> None:
        """Make it a tensor whose bytes lie here."""
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), self, strict=True):
            tensor.external_data.add(key=key, value=str(value))


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; of one in row-major order on the CPU no copy is made."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]


def large(length: int) -> bool:
    return length >= PAGE


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and contents."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        total.update(raw(tensor))
    return total.hexdigest()


def write_model(skeleton: Skeleton, path: Path, external: bool) -> None:
    """Write the .onnx file at `path` and, if `external`, one file of weights beside it, whose name
    holds their hash: so a file in place always finds the weights that it was written with."""
    places: dict[str, Place] = {}
    if external:
        data = path.with_name(f"{path.stem}-{digest(skeleton.weights)[:16]}.data")
        places = write_data(skeleton.weights, data)
    _write_graph(skeleton, path, places)


def _write_graph(skeleton: Skeleton, path: Path, elsewhere: dict[str, Place]) -> None:
    """The graph with the weights that are not elsewhere."""
    with open(path, "wb") as file:
        file.write(skeleton.model.SerializeToString())
        for name, tensor in skeleton.weights.items():
            header = onnx.TensorProto(name=name, dims=tensor.shape, data_type=KINDS[tensor.dtype])
            piece(file, header, elsewhere.get(name) or raw(tensor))
        _flush(file)


def write_data(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Place]:
    """Write their bytes one after the other; large ones begin at a page."""
    places = {}
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            content = raw(tensor)
            if large(content.nbytes):
                file.write(bytes(-file.tell() % PAGE))
            places[name] = Place(path.name, file.tell(), content.nbytes)
            file.write(content)
        _flush(file)
    return places


def piece(file: IO[bytes], tensor: onnx.TensorProto, content: memoryview | Place) -> None:
    """A ModelProto that holds nothing but one initializer, of these bytes or of those that lie
    elsewhere; bytes come last."""
    behind = memoryview(b"")
    if isinstance(content, Place):
        content.mark(tensor)
        head = tensor.SerializeToString()
    else:
        head, behind = tensor.SerializeToString() + _tag(RAW_DATA, content.nbytes), content
    size = len(head) + behind.nbytes
    within = _tag(INITIALIZER, size) + head
    file.write(_tag(GRAPH, size + len(within) - len(head)) + within)
    file.write(behind)


def _tag(field: int, size: int) -> bytes:
    """The tag of a field with a length in front, and that length, as protobuf's varints."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def checked_path(path: str | os.PathLike) -> Path:
    """Raises ConfigError for what is no path of a .onnx file."""
    target = Path(path)
    if target.suffix != ".onnx" or target.is_dir():
        raise ConfigError(f"path={str(path)!r}: expected the name of a file that ends in .onnx")
    return target


@contextmanager
def in_place(target: Path) -> Iterator[Path]:
    """A path to write to in a folder of its own; on success what lies there takes the place of the
    target and its weights, on an error nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".moe_rewrite-", dir=target.parent))
    try:
        yield folder / target.name
        made = sorted(folder.iterdir(), key=lambda p: p.name == target.name)  # the .onnx file last
        for file in made:
            os.chmod(file, 0o644)
            os.replace(file, target.parent / file.name)
        for old in _data_files(target):
            if old.name not in {m.name for m in made}:
                old.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _data_files(target: Path) -> list[Path]:
    name = re.compile(re.escape(target.stem) + r"-[0-9a-f]{16}\.data")
    return [p for p in target.parent.iterdir() if name.fullmatch(p.name)]


def needs_external(tensors: dict[str, torch.Tensor], asked: bool | None) -> bool:
    """Raises ConfigError where weights must be external and are asked not to be."""
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
