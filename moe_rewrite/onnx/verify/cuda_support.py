"""Which nodes of a file have no kernel in ONNX Runtime's CUDA provider.

From the table of kernels in ONNX Runtime's documentation (docs/OperatorKernels.md, section
CUDAExecutionProvider, operator sets from 20 on). A node without a kernel runs on the CPU, with
copies to and from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx
import torch

from ..file.dtypes import KINDS

INTEGERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
FLOATS = "float double float16"  # where there is no kernel for bfloat16
EVERY = f"{FLOATS} bfloat16 bool {INTEGERS}"
WIDE = f"{FLOATS} bfloat16 {INTEGERS}"
HALVES = f"{FLOATS} bfloat16"
WORDS = "int32 int64 uint32 uint64"
GROUPS = {  # types of a node's first input that is not a condition
    EVERY: "Cast Compress Concat ConstantOfShape Expand Flatten Gather GatherElements Identity "
    "Reshape Scan ScatterElements ScatterND Shape Size Slice Split Squeeze Transpose Trilu Unsqueeze "
    "ReverseSequence",
    WIDE: "Abs Add Div Mul Sub Sign",
    HALVES: "Dropout Erf Exp Gelu Gemm IsInf IsNaN LayerNormalization MatMul Relu Sigmoid Softmax "
    "Sqrt Sum Tanh",
    FLOATS: "ArgMax ArgMin AveragePool BatchNormalization Ceil Conv ConvTranspose Cos DepthToSpace "
    "Einsum Elu Floor GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish InstanceNormalization "
    "LeakyRelu Log LogSoftmax PRelu Reciprocal ReduceLogSumExp Round Selu Sin Softplus",
    f"{FLOATS} bool": "Pad",
    f"{HALVES} int32 int64 uint32 uint64": "Max Min Mod",
    f"{FLOATS} int64 int8 uint64 uint8": "Clip",
    f"{FLOATS} {WORDS}": "CumSum Greater GreaterOrEqual Less LessOrEqual",
    f"{FLOATS} {WORDS} bool": "Equal",
    f"{HALVES} int32 int64": "Pow ReduceSum Tile",
    f"{HALVES} int32 int64 uint8": "Where",
    f"{HALVES} int8 int16 int32 int64": "Neg",
    f"{HALVES} int64 bool": "GatherND",
    f"{FLOATS} int32 int64": "TopK ReduceMax",
    f"{FLOATS} int32": "ReduceMean ReduceL2",
    f"{FLOATS} int8 uint8": "MaxPool",
    f"{FLOATS} int32 uint8": "Resize",
    "float double int16 int32 int64": "Range",
    "bool float float16 int32 int64 uint8": "NonZero",
    "bool": "And Not Or Xor If",
    "float float16 bfloat16": "com.microsoft::MoE",
    "float16 bfloat16": "com.microsoft::QMoE",
}  # fmt: skip
KERNELS = {op: types.split() for types, ops in GROUPS.items() for op in ops.split()}
NO_KERNEL_NEEDED = {"Constant"}
CASTS = {"CastLike": "Cast"}  # a function of the ONNX standard -> the operator that it calls


def without_kernel(model: onnx.ModelProto, weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many nodes of each operator and type have no kernel on CUDA: ``{"CumSum bfloat16": 1}``.

    model: the graph. weights: initializers that are not in the graph.
    """
    types = _types(model, weights)
    found: Counter[str] = Counter()
    for node in _nodes(model.graph):
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if name in NO_KERNEL_NEEDED:
            continue
        main = node.input[1] if name == "Where" else next((i for i in node.input if i), "")
        kind = types.get(main, "")
        allowed = KERNELS.get(CASTS.get(name, name))
        if allowed is None or (kind and kind not in allowed):
            found[f"{name} {kind}".strip()] += 1
    return dict(found)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, including those of subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _types(model: onnx.ModelProto, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Type of each value, by name."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for name, tensor in weights.items():
        bare.graph.input.append(
            onnx.helper.make_tensor_value_info(name, KINDS[tensor.dtype], list(tensor.shape))
        )
    graph = onnx.shape_inference.infer_shapes(bare).graph
    known = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known.setdefault(value.name, value.type.tensor_type.elem_type)
    names = onnx.TensorProto.DataType.Name
    return {n: names(kind).lower() for n, kind in known.items() if kind}
