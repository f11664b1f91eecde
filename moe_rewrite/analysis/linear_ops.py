"""Products of activations with a parameter, whatever form they have in a graph.

nn.Linear, addmm with the weight stored (in, out), a matmul with a bare or transposed parameter, a
tied weight; or a 2-d convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..ir.aten import module_paths, op_name, value
from ..ir.program import Program
from .spatial import pair

aten = torch.ops.aten
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
CONVOLUTIONS |= {aten.convolution.default, aten.conv2d.padding, aten.conv1d.padding}
OTHER_PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


@dataclass(frozen=True)
class Product:
    """node = rows times weight. transposed: the weight is stored (in, out). options: stride,
    padding and dilation of a convolution."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool = False
    options: tuple[Any, ...] = ()

    @property
    def bias(self) -> fx.Node | None:
        """What the node itself adds to the product."""
        args = self.node.args
        if self.node.target is aten.addmm.default:
            found = args[0]
        else:
            takes_bias = self.node.target is aten.linear.default or self.options
            found = args[2] if takes_bias and len(args) > 2 else None
        return found if isinstance(found, fx.Node) else None


def place(node: fx.Node) -> str:
    """The innermost module around a node, or the node's own name outside all."""
    paths = module_paths(node)
    return paths[-1][0] if paths else node.name


def find_product(program: Program, node: fx.Node) -> Product | str | None:
    """The product that a node computes, or why it is not a site, or None where it is nothing."""

    def weight(n: Any) -> bool:
        return (
            isinstance(n, fx.Node) and n.op == "placeholder"
            and program.inputs[n.name].kind == "weight" and value(n).ndim == 2
        )  # fmt: skip

    if node.target in CONVOLUTIONS:
        return _convolution(program, node)
    if node.target in OTHER_PRODUCTS:
        if any(isinstance(a, fx.Node) and weight(a) for a in pytree.tree_leaves(node.args)):
            return f"{node.target} with a parameter is not a plain linear map"
        return None
    rows: Any
    factor: Any
    if node.target is aten.linear.default:
        rows, factor = node.args[:2]
        if weight(factor):
            return Product(node, rows, factor)
        return "the weight is computed in the graph, not a parameter"
    if node.target is aten.addmm.default:
        rows, factor = node.args[1:3]
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return "addmm with alpha or beta"
    elif node.target in (aten.mm.default, aten.matmul.default):
        rows, factor = node.args[:2]
    else:
        return None
    if weight(factor):
        return Product(node, rows, factor, transposed=True)
    if isinstance(factor, fx.Node) and factor.target in TRANSPOSES and weight(factor.args[0]):
        stored: Any = factor.args[0]
        return Product(node, rows, stored)
    return None


def _convolution(program: Program, node: fx.Node) -> Product | str:
    rows: Any
    weight: Any
    rows, weight = node.args[:2]
    transposed = op_name(node) == "convolution" and node.args[6]
    if value(node).ndim != 4 or transposed:
        return "a convolution that is not a plain 2-d one"
    if weight.op != "placeholder" or program.inputs[weight.name].kind != "weight":
        return "the weight is computed in the graph, not a parameter"
    options: list[Any] = [[1, 1], [0, 0], [1, 1]]
    given = node.args[3:6]
    options[: len(given)] = given
    padding = options[1] if isinstance(options[1], str) else list(pair(options[1]))
    return Product(
        node, rows, weight, options=(list(pair(options[0])), padding, list(pair(options[2])))
    )
