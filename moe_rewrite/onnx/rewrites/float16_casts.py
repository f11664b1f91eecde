"""Casts to float32 around nodes for which ONNX, ONNX Runtime or NumPy has no 16-bit type."""

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
    """Insert casts into the graph of a 16-bit model. The types of its outputs are known."""
    _widen(graph)
    for node in list(graph.all_nodes()):
        if node.domain:
            continue
        _type_outputs(node, opset)
        if node.op_type.startswith("Scatter") and "reduction" in node.attributes:
            # ONNX Runtime's CPU provider has no 16-bit scatter with addition
            _in_float32(node, [i for i in (0, 2) if _dtype(node.inputs[i]) in HALVES], [0])
        else:
            _in_float32(node, *_without_bfloat16(node, opset))


def _widen(graph: ir.Graph) -> None:
    """Make bfloat16 inputs and outputs float32, since NumPy has no bfloat16."""
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
    """Cast these inputs of a node up to float32, and these of its outputs back."""
    graph = node.graph
    if not inputs or graph is None:
        return
    first = node.outputs[0].name  # unique, unlike generated names in subgraphs
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
    """Indices of a node's bfloat16 inputs and outputs, if the operator does not allow bfloat16, or
    CUDA has a kernel for float32 only: the node would run on the CPU, between copies."""
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
    """Set the output types, which nodes made for experts lack, by the operator's schema."""
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
    if "value" in node.attributes:  # a constant
        kinds[schema.outputs[0].type_str] = node.attributes["value"].as_tensor().dtype
    for _, value, kind in _formal(node.outputs, schema.outputs):
        dtype = kinds.get(kind) or _concrete(kind)
        if value is not None and value.dtype is None and dtype is not None:
            value.type = ir.TensorType(dtype)


def _formal(
    values: Sequence[ir.Value | None], formal: Sequence[Any]
) -> Iterator[tuple[int, ir.Value | None, str]]:
    """(index, value, type or type variable) of each; the schema's last one may be variadic."""
    for i, value in enumerate(values):
        yield i, value, formal[min(i, len(formal) - 1)].type_str


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _concrete(kind: str) -> ir.DataType | None:
    """The dtype of a schema's type, like ``tensor(int64)``; None for a type variable."""
    name = kind.removeprefix("tensor(").removesuffix(")").upper()
    return ir.DataType.__members__.get(name)


@cache
def _schema(op: str, opset: int) -> Any:
    return onnx.defs.get_schema(op, opset) if onnx.defs.has(op) else None
