"""The metadata of an exported file, validated when read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from ...errors import CheckpointError
from ...utils.read_files import parse_json, require_plain, shown
from ..trace.weights import ExpertDim

FORMAT = 1
PREFIX = "moe_rewrite."
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # a file in the same folder


@dataclass(frozen=True)
class Facts:
    """The metadata of an exported file.

    base: digest of the frozen weights.
    experts: their names.
    stacks: tensors that hold all experts, with the dimension of these.
    cache: whether the graph takes and returns the key-value cache.
    largest: by input, its bounded dimensions with their largest size.
    """

    base: str
    experts: list[str]
    stacks: dict[str, ExpertDim]
    cache: bool
    largest: dict[str, dict[int, int]]


def read_facts(path: Path) -> tuple[Facts, onnx.ModelProto]:
    """The metadata of a file, and the model without external weights.

    Raises CheckpointError for a file that is damaged, not written by `export_onnx`, newer, or that
    refers to weights outside its folder.
    """
    require_plain(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise CheckpointError(f"{path}: not an ONNX file ({error})") from None
    raw = {p.key: p.value for p in model.metadata_props}
    if not model.graph.node or PREFIX + "format" not in raw:
        raise CheckpointError(f"{path}: was not written by export_onnx(); use onnxruntime itself")
    where = f"{path}: its metadata"
    own = {k.removeprefix(PREFIX): v for k, v in raw.items() if k.startswith(PREFIX)}
    said = {k: parse_json(v, where) for k, v in own.items()}  # tools add others
    if said["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {shown(said['format'])}, this version reads {FORMAT}: upgrade moe_rewrite"
        )
    facts = _facts(path, said, {t.name: t for t in model.graph.initializer})
    if model.functions or model.graph.sparse_initializer:
        raise CheckpointError(f"{path}: holds functions or sparse weights, which no export writes")
    for tensor in _tensors(model.graph):
        _require_inside(path, tensor)
    return facts, model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that could be external, including those in constants and subgraphs."""
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _facts(path: Path, said: dict[str, Any], tensors: dict[str, onnx.TensorProto]) -> Facts:
    base, experts, stacks = said.get("base"), said.get("experts"), said.get("stacks")
    exported, largest = said.get("export"), said.get("largest", {})
    well_formed = (
        isinstance(base, str) and isinstance(stacks, dict)
        and isinstance(exported, dict) and isinstance(exported.get("cache"), bool)
        and isinstance(experts, list) and all(isinstance(e, str) for e in experts)
        and all(n in tensors and _is_stack(s, tensors[n]) for n, s in stacks.items())
        and isinstance(largest, dict) and all(map(_are_bounds, largest.values()))
    )  # fmt: skip
    if not well_formed:
        raise CheckpointError(f"{path}: its metadata is malformed")
    assert isinstance(base, str) and isinstance(experts, list) and isinstance(stacks, dict)
    bounds = {n: {int(d): size for d, size in dims.items()} for n, dims in largest.items()}
    stacked = {n: ExpertDim(*s) for n, s in stacks.items()}
    return Facts(base, experts, stacked, exported["cache"], bounds)  # type: ignore[index]


def _are_bounds(said: Any) -> bool:
    """JSON writes dimensions as strings."""
    return isinstance(said, dict) and all(
        re.fullmatch("[0-9]{1,3}", d) and type(size) is int for d, size in said.items()
    )


def _is_stack(said: Any, tensor: onnx.TensorProto) -> bool:
    if not (isinstance(said, list) and len(said) == 2 and all(type(n) is int for n in said)):
        return False
    dim, each = said
    return 0 <= dim < len(tensor.dims) and each >= 1 and tensor.dims[dim] % each == 0


def _require_inside(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise CheckpointError unless an external weight is complete and in the model's folder."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entry = {e.key: e.value for e in tensor.external_data}
    name = entry.get("location", "")
    file = path.parent / name
    if not PLAIN_NAME.fullmatch(name) or file.is_symlink():
        raise CheckpointError(
            f"{path}: {tensor.name} is in {name!r}: expected a file in the same folder"
        )
    try:
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
        if min(offset, length) < 0:
            raise ValueError(entry)
    except ValueError:
        raise CheckpointError(f"{path}: {tensor.name} has a malformed range in {name}") from None
    if not file.is_file() or file.stat().st_size < offset + length:
        raise CheckpointError(f"{file}: missing or shorter than {path.name} says")


def require_stack(name: str, stack: ExpertDim, old: onnx.TensorProto, new: torch.Tensor) -> int:
    """The number of experts in a tensor that is to replace an initializer.

    Raises CheckpointError if its shape or dtype does not fit.
    """
    from .dtypes import KINDS

    open_ = [d if i != stack.dim else None for i, d in enumerate(old.dims)]
    given = [d if i != stack.dim else None for i, d in enumerate(new.shape)]
    count, rest = divmod(new.shape[stack.dim] if open_ == given else 1, stack.each)
    if open_ != given or rest or KINDS.get(new.dtype) != old.data_type:
        raise CheckpointError(
            f"{name}: {tuple(new.shape)} of {new.dtype} cannot replace {tuple(old.dims)}: only "
            f"dimension {stack.dim} may differ, in steps of {stack.each}"
        )
    return count
