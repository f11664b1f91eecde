"""A region's code for when no gradient is wanted: fewer maps in memory, the same values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Code

aten = torch.ops.aten
FRESH = (aten.conv2d.default, aten.batch_norm.default)  # whose results nobody else holds
IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.silu.default: aten.silu_.default,
}


def for_inference(code: Code) -> Code:
    """Batch norm with frozen statistics folded into the convolution before it, and activations in
    place. The folding is done in every call, on weights only: they may have changed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    made = graph.graph_copy(code.module.graph, copies)
    graph.output(made)
    for node in list(graph.nodes):
        if node.target is aten.batch_norm.default and node.args[5] is False:
            _fold(graph, node)
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.target in IN_PLACE and isinstance(source, fx.Node) and _only_read_by(source, node):
            node.target = IN_PLACE[node.target]
    return Code(fx.GraphModule(torch.nn.Module(), graph))


def _only_read_by(source: fx.Node, reader: fx.Node) -> bool:
    return source.target in FRESH and list(source.users) == [reader]


def _fold(graph: fx.Graph, norm: fx.Node) -> None:
    """norm(conv(x, w) + b) = conv(x, w * s) + shift - (mean - b) * s, with s = scale / std."""
    x, scale, shift, mean, variance, _, _, eps = norm.args[:8]
    if not isinstance(x, fx.Node) or x.target is not aten.conv2d.default:
        return
    if not _only_read_by(x, norm) or mean is None:
        return
    args: Any = (*x.args, None)[: max(3, len(x.args))]
    with graph.inserting_before(x):

        def op(target: Any, *given: Any) -> fx.Node:
            return graph.call_function(target, given)

        s = op(aten.rsqrt.default, op(aten.add.Tensor, variance, eps))
        s = s if scale is None else op(aten.mul.Tensor, s, scale)
        weight = op(aten.mul.Tensor, args[1], op(aten.view.default, s, [-1, 1, 1, 1]))
        bias = op(
            aten.mul.Tensor, mean if args[2] is None else op(aten.sub.Tensor, mean, args[2]), s
        )
        bias = op(aten.neg.default, bias) if shift is None else op(aten.sub.Tensor, shift, bias)
    x.args = (args[0], weight, bias, *args[3:])
    norm.replace_all_uses_with(x)
    graph.erase_node(norm)
