"""Run a 16-bit file in little memory on ONNX Runtime's CPU provider, which computes in float32.

The provider inserts casts of weights, and of a node's inputs it runs those first that were added to
the graph last: so many weights are in memory in float32 before the first of them is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
import torch

from ...frontend.tracing.trace_memory import release_memory
from ..runtime.session import FRUGAL, frugal_options


@contextmanager
def late_casts(path: Path, dtype: torch.dtype) -> Iterator[tuple[Path, Any]]:
    """(a file with the same computation as the one at `path`, options of a session on it).

    For a 16-bit dtype it has ONNX Runtime's own casts, ordered so that each weight is cast when it
    is needed, and refers to the same external bytes. It is `path` itself for other dtypes, or if
    ONNX Runtime writes no such file.

    dtype: of the model.
    """
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
    """Write the graph at `path` with the casts at `made`; returns whether that was possible. Nodes
    that depend only on weights come first in it, so that ONNX Runtime runs them last."""
    import onnxruntime as ort

    # the next higher level would convert all weights to float32 permanently
    options = frugal_options("ENABLE_EXTENDED")
    options.optimized_model_filepath = str(made)
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    source = _without_bytes(path)
    release_memory()
    with suppress(Exception):  # ONNX Runtime's errors have no common base
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
    """The graph with external weights as inputs, so that no byte of them is read, and without
    value_info, which takes a fifth of a session's memory."""
    graph = (model := onnx.load(path, load_external_data=False)).graph
    for tensor in [t for t in graph.initializer if t.external_data]:
        graph.initializer.remove(tensor)
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        graph.input.append(value)
    del graph.value_info[:]
    return model.SerializeToString()


def _put_back(graph: onnx.GraphProto, said: onnx.GraphProto) -> None:
    """Restore the external weights, and the value_info of values that still exist."""
    outside = {t.name: t for t in said.initializer if t.external_data}
    for value in [i for i in graph.input if i.name in outside]:
        graph.input.remove(value)
    graph.initializer.extend(outside.values())
    made = {name for node in graph.node for name in node.output}
    del graph.value_info[:]
    graph.value_info.extend(v for v in said.value_info if v.name in made)
