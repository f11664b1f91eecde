"""Protobuf messages in pieces: an initializer at a time."""

from __future__ import annotations

from typing import IO, NamedTuple

import onnx

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto, TensorProto


PAGE = 4096  # bytes from which a weight is large: it starts at an offset that can be mapped


class FileRange(NamedTuple):
    """Where the bytes of a weight are: name of the file, offset and length in bytes."""

    file: str
    offset: int
    length: int

    def mark(self, tensor: onnx.TensorProto) -> None:
        """Make this an external tensor with its bytes in this range."""
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), self, strict=True):
            tensor.external_data.add(key=key, value=str(value))


def large(length: int) -> bool:
    return length >= PAGE


def piece(file: IO[bytes], tensor: onnx.TensorProto, content: memoryview | FileRange) -> None:
    """Write a ModelProto with one initializer and nothing else; its bytes, if not in another file,
    come last."""
    data = memoryview(b"")
    if isinstance(content, FileRange):
        content.mark(tensor)
        head = tensor.SerializeToString()
    else:
        head, data = tensor.SerializeToString() + _tag(RAW_DATA, content.nbytes), content
    size = len(head) + data.nbytes
    within = _tag(INITIALIZER, size) + head
    file.write(_tag(GRAPH, size + len(within) - len(head)) + within)
    file.write(data)


def _tag(field: int, size: int) -> bytes:
    """The tag and length of a length-delimited field, as protobuf's varints."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))
