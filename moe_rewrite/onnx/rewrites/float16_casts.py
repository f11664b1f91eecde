"""16-bit values where the standard, ONNX Runtime or NumPy has none: float32, between casts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

from ..verify.cuda_support import KERNELS

SINGLE, HALF = ir.DataType.FLOAT, ir.DataType.BFLOAT16
HALVES = (ir.DataType.FLOAT16, HALF)
BFLOAT16 = "tensor(bfloat16)"


def insert_float16_casts(graph: ir.Graph, opset: int) -> None:
    """graph: of a model with 16-bit values; all that a call gives has a type."""
    _widen(graph)
    for node in list(graph.all_nodes()):
        if node.domain:
            continue
        _type_outputs(node, opset)
        if node.op_type.startswith("Scatter") and "reduction" in node.attributes:
            # ONNX Runtime's CPU provider adds up nothing in 16 bits
            _in_float32(node, [i for i in (0, 2) if _dtype(node.inputs[i]) in HALVES], [0])
        else:
            _in_float32(node, *_without_bfloat16(node, opset))


def _widen(graph: ir.Graph) -> None:
    """A call gives and gets float32 where the model has bfloat16, which NumPy does not know."""
    for i, value in enumerate(list(graph.inputs)):
        if value.dtype == HALF:
            given = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(SINGLE))
            node = _cast(given, HALF)
            ir.convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
            graph.inputs[i] = given
            graph.insert_before(graph[0], node)
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype == HALF:
            node = _cast(value, SINGLE)
            graph.append(node)
            graph.outputs[i] = node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node


def _in_float32(node: ir.Node, inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """Cast these of a node's inputs up to float32, and these of its outputs back, if any is."""
    graph = node.graph
    if not inputs or graph is None:
        return
    first = node.outputs[0].name  # others' names would be the same in all subgraphs
    dtype = _dtype(node.inputs[inputs[0]])
    assert dtype is not None
    for i in inputs:
        value = node.inputs[i]
        assert value is not None
        wide = _cast(value, SINGLE)
        wide.outputs[0].name = f"{first}.wide_{i}"
        graph.insert_before(node, wide)
        node.replace_input_with(i, wide.outputs[0])
    for value in (node.outputs[i] for i in outputs):
        value.type = ir.TensorType(SINGLE)
        narrow = _cast(value, dtype)
        narrow.outputs[0].name = f"{value.name}.narrow"
        ir.convenience.replace_all_uses_with(value, narrow.outputs[0], replace_graph_outputs=True)
        narrow.replace_input_with(0, value)
        graph.insert_after(node, narrow)


def _without_bfloat16(node: ir.Node, opset: int) -> tuple[list[int], list[int]]:
    """Places of a node's inputs and outputs in bfloat16, where the operator set has no such or CUDA
    no kernel, but one for float32: else the node would run on the CPU, between copies."""
    schema = _schema(node.op_type, opset)
    if schema is None:
        return [], []
    kernels = KERNELS.get(node.op_type, [])
    slow = "float" in kernels and "bfloat16" not in kernels
    lacking = {
        c.type_param_str
        for c in schema.type_constraints
        if slow or BFLOAT16 not in c.allowed_type_strs
    }
    given, made = (
        [
            i
            for i, value, kind in _formal(values, formal)
            if _dtype(value) == HALF and kind in lacking
        ]
        for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs))
    )
    return given, made


def _type_outputs(node: ir.Node, opset: int) -> None:
    """Of a node that was made for experts: by the operator's schema."""
    schema = _schema(node.op_type, opset)
    if schema is None or all(value.dtype is not None for value in node.outputs):
        return
    kinds: dict[str, Any] = {
        kind: _dtype(value) for _, value, kind in _formal(node.inputs, schema.inputs)
    }
    for constraint in schema.type_constraints:
        if len(constraint.allowed_type_strs) == 1:
            kinds.setdefault(constraint.type_param_str, _concrete(constraint.allowed_type_strs[0]))
    if "to" in node.attributes:
        kinds[schema.outputs[0].type_str] = ir.DataType(node.attributes["to"].as_int())
    if "value" in node.attributes:  # of a constant
        kinds[schema.outputs[0].type_str] = node.attributes["value"].as_tensor().dtype
    for _, value, kind in _formal(node.outputs, schema.outputs):
        dtype = kinds.get(kind) or _concrete(kind)
        if value is not None and value.dtype is None and dtype is not None:
            value.type = ir.TensorType(dtype)


def _formal(
    values: Sequence[ir.Value | None], formal: Sequence[Any]
) -> Iterator[tuple[int, ir.Value | None, str]]:
    """(place, value, type or its name in the schema) of each; the last of a schema may be many."""
    for i, value in enumerate(values):
        yield i, value, formal[min(i, len(formal) - 1)].type_str


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _concrete(kind: str) -> ir.DataType | None:
    """Of ``tensor(int64)``."""
    name = kind.removeprefix("tensor(").removesuffix(")").upper()
    return ir.DataType.__members__.get(name)


@cache
def _schema(op: str, opset: int) -> Any:
    return onnx.defs.get_schema(op, opset) if onnx.defs.has(op) else None
