"""A region's code for inference: fewer maps in memory, the same values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.ops import argument, first, op, op_name, set_argument
from ...ir.program import Code

aten = torch.ops.aten
IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.silu.default: aten.silu_.default,
}


def for_inference(code: Code) -> Code:
    """The code with frozen batch norms folded into the convolutions before them, and activations in
    place. Weights are folded in every call, since they may have changed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    made = graph.graph_copy(code.module.graph, copies)
    graph.output(made)
    for node in list(graph.nodes):
        if op_name(node) == "batch_norm" and argument(node, "training") is False:
            _fold(graph, node)
    for node in graph.nodes:
        source = first(node)
        if node.target in IN_PLACE and isinstance(source, fx.Node) and _only_read_by(source, node):
            node.target = IN_PLACE[node.target]
    return Code(fx.GraphModule(torch.nn.Module(), graph))


def _only_read_by(source: fx.Node, reader: fx.Node) -> bool:
    return op(source).fresh and list(source.users) == [reader]


def _fold(graph: fx.Graph, norm: fx.Node) -> None:
    """norm(conv(x, w) + b) = conv(x, w * s) + shift - (mean - b) * s, with s = scale / std."""
    conv = first(norm)
    scale, shift, mean, variance, eps = (
        argument(norm, n) for n in ("weight", "bias", "running_mean", "running_var", "eps")
    )
    if not isinstance(conv, fx.Node) or conv.target is not aten.conv2d.default:
        return
    if not _only_read_by(conv, norm) or mean is None:
        return
    weight, bias = argument(conv, "weight"), argument(conv, "bias")
    with graph.inserting_before(conv):

        def add(target: Any, *given: Any) -> fx.Node:
            return graph.call_function(target, given)

        s = add(aten.rsqrt.default, add(aten.add.Tensor, variance, eps))
        s = s if scale is None else add(aten.mul.Tensor, s, scale)
        weight = add(aten.mul.Tensor, weight, add(aten.view.default, s, [-1, 1, 1, 1]))
        lower = mean if bias is None else add(aten.sub.Tensor, mean, bias)
        lower = add(aten.mul.Tensor, lower, s)
        bias = add(aten.neg.default, lower) if shift is None else add(aten.sub.Tensor, shift, lower)
    set_argument(conv, "weight", weight)
    set_argument(conv, "bias", bias)
    norm.replace_all_uses_with(conv)
    graph.erase_node(norm)
