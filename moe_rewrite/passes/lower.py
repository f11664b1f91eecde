"""Replace reference operations by fused ones, where a site allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..analysis.products import Product, find_product
from ..feedforward.call import FeedForwardCall
from ..kernels.lora.op import lora_linear
from ..kernels.lora.reference import add_lora_experts
from ..program import Program, value


def lower(program: Program) -> Program:
    """Exact for LoRA experts while their B is zero; a fused feed-forward adds up in another order."""
    regions = False
    for node in list(program.graph.nodes):
        if isinstance(node.target, FeedForwardCall):
            node.target = node.target.lowered()
            regions |= node.target.form is not None
        elif node.target is add_lora_experts:
            _fuse_lora(program, node)
    return program.after("lower", "reordered" if regions else "exact")


def _fuse_lora(program: Program, node: fx.Node) -> None:
    """One op for a product and the experts behind it, where nothing else reads the product."""
    out: Any
    rows: Any
    out, rows, *rest = node.args
    product = find_product(program, out)
    if not isinstance(product, Product) or product.rows is not rows or set(out.users) != {node}:
        return
    graph = program.graph
    with graph.inserting_before(node):
        weight = product.weight
        if product.transposed:
            weight = graph.call_function(torch.ops.aten.t.default, (weight,))
            weight.meta = {"val": value(product.weight).t()}
        fused = graph.call_function(lora_linear, (rows, weight, product.bias, *rest))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
    graph.erase_node(out)
