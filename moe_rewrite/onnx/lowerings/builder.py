"""Builds the nodes of one site, which replace its placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch


@dataclass
class Builder:
    """Makes nodes in order.

    name: prefix of the names of its values.
    nodes: the nodes made so far.
    weights: new initializers that the nodes take, by name.
    inputs: the values of these.
    """

    name: str
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: list[ir.Value] = field(default_factory=list)

    def op(
        self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "",
        **attributes: Any,
    ) -> Any:  # fmt: skip
        """Add a node; returns its output, or a tuple of several."""
        node = ir.node(kind, list(inputs), attributes or None, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        for i, value in enumerate(node.outputs):
            value.name = f"{self.name}.{len(self.nodes)}.{kind}" + f".{i}" * bool(i)
        return node.outputs if outputs > 1 else node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype)))

    def weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        self.weights[f"{self.name}.{name}"] = tensor
        kind = ir.TensorType(ir.tensor_adapters.from_torch_dtype(tensor.dtype))
        value = ir.Value(name=f"{self.name}.{name}", type=kind, shape=ir.Shape(tensor.shape))
        self.inputs.append(value)
        return value

    def inline(self, graph: ir.Graph, inputs: Sequence[ir.Value]) -> ir.Value:
        """Copy a graph, which must have no subgraphs, onto these inputs; returns its one output."""
        value_of: dict[Any, Any] = dict(zip(graph.inputs, inputs, strict=True)) | {None: None}
        for tensor in graph.initializers.values():
            assert tensor.const_value is not None
            value_of[tensor] = self.op("Constant", value=tensor.const_value)
        for node in graph:
            made = ir.Node(
                node.domain, node.op_type, [value_of[v] for v in node.inputs],
                list(node.attributes.values()), num_outputs=len(node.outputs),
            )  # fmt: skip
            self.nodes.append(made)
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name = f"{self.name}.{len(self.nodes)}.{old.name}"
                value_of[old] = new
        return value_of[graph.outputs[0]]
