"""One expert of a site as a graph of rows and weights, for any feed-forward region."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ...experts.ffn.call import FeedForwardCall, Weights
from ..trace.torch_export import onnx_program


class _Body(nn.Module):
    def __init__(self, call: FeedForwardCall) -> None:
        super().__init__()
        self.body = (call.body,)

    def forward(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        return self.body[0](x, weights)


def body_graph(call: FeedForwardCall, weights: Weights, width: int, opset: int) -> ir.Graph:
    """The graph of one expert: inputs x (n, width) for any n and the weights, output (n, width)."""
    x = weights[0].new_zeros(7, width)
    rows: Any = {0: torch.export.Dim("rows")}
    given = (x, list(weights))
    program = onnx_program(_Body(call), given, (rows, [None] * len(weights)), opset)
    return _products_as_gemm(program.model.graph)


def _products_as_gemm(graph: ir.Graph) -> ir.Graph:
    """Write ``x W^T`` as one Gemm that reads W as it is: a transposed weight would be a second copy
    in memory."""
    for node in list(graph):
        right: Any = node.inputs[1] if node.op_type == "MatMul" else None
        turned = right and right.producer()
        if not turned or turned.op_type != "Transpose" or turned.inputs[0].shape.rank() != 2:
            continue
        fused = ir.node("Gemm", [node.inputs[0], turned.inputs[0]], {"transB": 1})
        fused.outputs[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [fused], node.outputs, fused.outputs
        )
        if not turned.outputs[0].uses():
            graph.remove(turned, safe=True)
    return graph
