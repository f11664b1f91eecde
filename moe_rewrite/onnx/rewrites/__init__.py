"""Rewrites of an exported graph into fewer and larger nodes with the same result."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .lora_matmul import join_first_products, join_second_products
from .noop_reshape import drop_reshapes
from .rms_norm import divide_by_roots
from .rotary import fold_signs


def rewrite(model: ir.Model, experts: Container[str]) -> None:
    """Apply every rewrite. experts: names of the values that are stacks of experts' weights."""
    graph = model.graph
    divide_by_roots(graph)
    join_first_products(graph, experts)
    join_second_products(graph, experts)
    drop_reshapes(graph)
    fold_signs(graph)
    RemoveUnusedNodesPass()(model)
