"""Reread a written file for verification: the same graph, with large weights left in the file.

A protobuf message is a sequence of fields: a varint with number and wire type, then a varint (type
0), or a length and that many bytes (type 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import onnx
import torch

from ...errors import EquivalenceError
from ...utils.tensor_bytes import tensor_bytes
from ..file.protobuf import GRAPH, INITIALIZER, RAW_DATA, FileRange, large, piece
from ..file.write import write_data
from ..runtime.session import replace_initializers

PIECE = 1 << 20


def write_external_view(path: Path, twin: Path) -> dict[str, FileRange]:
    """Copy the file at `path` to `twin`, in the same folder, with large weights as references into
    the file at `path`.

    Returns the range of each weight, as the file has it. Raises EquivalenceError if the file is not
    a sequence of complete fields.
    """
    ranges, size = {}, path.stat().st_size
    with open(path, "rb") as file, open(twin, "wb") as out:
        while (start := file.tell()) < size:
            number, end = _field(file, size)
            found = _initializer(file, end) if number == GRAPH else None
            if found is not None:
                tensor, length = found
                place = _said(tensor) or FileRange(path.name, end - length, length)
                ranges[tensor.name] = place
                if place.file == path.name and large(length):
                    piece(out, tensor, place)
                    file.seek(end)
                    continue
            file.seek(start)
            for done in range(start, end, PIECE):
                out.write(file.read(min(PIECE, end - done)))
    return ranges


@contextmanager
def view_with_values(path: Path, replaced: dict[str, torch.Tensor]) -> Iterator[Path]:
    """The graph at `path` with other values, perhaps of other sizes, for some initializers. Their
    bytes are in a separate file: inside the graph they would be copied several times in memory."""
    model = onnx.load(path, load_external_data=False)
    graph, data = (path.with_name(f"other-{path.stem}{end}") for end in (".onnx", ".data"))
    try:
        replace_initializers(model, replaced, write_data(replaced, data))
        graph.write_bytes(model.SerializeToString())
        del model  # the session needs as much memory
        yield graph
    finally:
        for file in (graph, data):
            file.unlink(missing_ok=True)


def weights_match(
    ranges: dict[str, FileRange], weights: dict[str, torch.Tensor], folder: Path
) -> bool:
    """Whether the files contain these weights, byte for byte; reads in pieces."""
    if ranges.keys() != weights.keys():
        return False
    for name, tensor in weights.items():
        content, place = tensor_bytes(tensor), ranges[name]
        if content.nbytes != place.length:
            return False
        with open(folder / place.file, "rb") as file:
            file.seek(place.offset)
            for start in range(0, place.length, PIECE):
                wanted = content[start : start + PIECE]
                if file.read(len(wanted)) != wanted:
                    return False
    return True


def _initializer(file: IO[bytes], end: int) -> tuple[onnx.TensorProto, int] | None:
    """(initializer without its raw data, length of the data) of a graph with one initializer, whose
    data come last, and nothing else; None for other graphs."""
    number, stop = _field(file, end)
    if number != INITIALIZER or stop != end:
        return None
    start = head = file.tell()
    while head < end:
        number, stop = _field(file, end)
        if number == RAW_DATA and stop == end:
            break
        head = stop
        file.seek(head)
    length = end - file.tell()
    file.seek(start)
    return onnx.TensorProto.FromString(file.read(head - start)), length


def _said(tensor: onnx.TensorProto) -> FileRange | None:
    """The range of an external weight; None for other tensors."""
    facts = {fact.key: fact.value for fact in tensor.external_data}
    if not facts:
        return None
    return FileRange(facts["location"], int(facts["offset"]), int(facts["length"]))


def _field(file: IO[bytes], end: int) -> tuple[int, int]:
    """(number, end) of the field that starts here; leaves the file at the start of its content."""
    tag = _varint(file)
    number, kind = tag >> 3, tag & 7
    if kind == 0:
        _varint(file)
        stop = file.tell()
    else:
        length = _varint(file)
        stop = file.tell() + length
    if kind not in (0, 2) or stop > end:
        raise _broken(file)
    return number, stop


def _varint(file: IO[bytes]) -> int:
    number = shift = 0
    while True:
        byte = file.read(1)
        if not byte or shift > 63:
            raise _broken(file)
        number |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return number
        shift += 7


def _broken(file: IO[bytes]) -> EquivalenceError:
    return EquivalenceError(
        f"{Path(file.name).name} as written is no ONNX file, at byte {file.tell()}: is the disk in "
        "order?"
    )
