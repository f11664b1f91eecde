"""A 16-bit file as ONNX Runtime's CPU provider computes it: for the most part in float32.

It runs first, of all that a node needs, what was added last to the graph, and the casts of weights
are added by itself: many weights lie in memory in float32 before the first of them is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
import torch

from ...frontend.trace_memory import release_memory
from ..runtime.session import FRUGAL, frugal_options


@contextmanager
def late_casts(path: Path, dtype: torch.dtype) -> Iterator[tuple[Path, Any]]:
    """(a graph that computes as the one at `path`, options of a session on it). dtype: of the model.
    Of 16 bits it is one with ONNX Runtime's own casts, each of a weight run when it is needed, and
    the bytes outside the file stay there; `path` itself where ONNX Runtime makes none."""
    if dtype.itemsize >= 4:
        yield path, frugal_options()
        return
    made = path.with_name(f"casts-{path.name}")
    try:
        if _made(path, made):
            yield made, frugal_options("DISABLE_ALL")
        else:
            yield path, frugal_options("ENABLE_EXTENDED")
    finally:
        made.unlink(missing_ok=True)


def _made(path: Path, made: Path) -> bool:
    """Whether the graph at `path` with the casts could be written at `made`. What is computed from
    weights alone is put first there: the descent that ends in it then comes last."""
    import onnxruntime as ort

    # one level more, and all weights would be float32 for good
    options = frugal_options("ENABLE_EXTENDED")
    options.optimized_model_filepath = str(made)
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    source = _without_bytes(path)
    release_memory()
    with suppress(Exception):  # ONNX Runtime's have no common base
        ort.InferenceSession(source, options, ["CPUExecutionProvider"], **FRUGAL)
    if not made.exists():
        return False
    said, graph = onnx.load(path, load_external_data=False).graph, (model := onnx.load(made)).graph
    _put_back(graph, said)
    known = {t.name for t in graph.initializer}
    for node in graph.node:
        whole = not any(a.HasField("g") for a in node.attribute)
        if whole and node.input and known.issuperset(filter(None, node.input)):
            known.update(node.output)
    graph.node.sort(key=lambda node: not known.issuperset(node.output))
    made.write_bytes(model.SerializeToString())
    return True


def _without_bytes(path: Path) -> bytes:
    """The graph, its weights outside the file as inputs, of which no byte is read, and without what
    it says of values in between, which takes a session a fifth of its memory."""
    graph = (model := onnx.load(path, load_external_data=False)).graph
    for tensor in [t for t in graph.initializer if t.external_data]:
        graph.initializer.remove(tensor)
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        graph.input.append(value)
    del graph.value_info[:]
    return model.SerializeToString()


def _put_back(graph: onnx.GraphProto, said: onnx.GraphProto) -> None:
    """What the file says of its weights, and of the values that are still there."""
    outside = {t.name: t for t in said.initializer if t.external_data}
    for value in [i for i in graph.input if i.name in outside]:
        graph.input.remove(value)
    graph.initializer.extend(outside.values())
    made = {name for node in graph.node for name in node.output}
    del graph.value_info[:]
    graph.value_info.extend(v for v in said.value_info if v.name in made)
