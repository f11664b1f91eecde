"""A step's graph as a Python function that runs it in as few microseconds as Python allows.

Operators are called through PyTorch's own bindings (`torch.mul`) where one takes the same arguments:
that takes a microsecond less than calling the overload (`torch.ops.aten.mul.Tensor`), of which a
decoded token has hundreds. For torch.compile there is a form of its own; exports read the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import InvariantError
from ...ir.ops import output_of
from ...kernels.grouped_product import in_eager

aten, nn = torch.ops.aten, torch._C._nn

BINDINGS: dict[Any, Callable] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div, aten.neg.default: torch.neg, aten.exp.default: torch.exp,
    aten.pow.Tensor_Scalar: torch.pow, aten.rsqrt.default: torch.rsqrt,
    aten.sqrt.default: torch.sqrt, aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid, aten.relu.default: torch.relu,
    aten.silu.default: nn.silu, aten.gelu.default: nn.gelu, aten.softmax.int: torch.softmax,
    aten.mean.dim: torch.mean, aten.sum.dim_IntList: torch.sum, aten.cos.default: torch.cos,
    aten.sin.default: torch.sin, aten.cat.default: torch.cat, aten.matmul.default: torch.matmul,
    aten.bmm.default: torch.bmm, aten.linear.default: nn.linear, aten.conv2d.default: torch.conv2d,
    aten.layer_norm.default: torch.layer_norm, aten.batch_norm.default: torch.batch_norm,
    aten.embedding.default: torch.embedding, aten.dropout.default: torch.dropout,
    aten.scaled_dot_product_attention.default: nn.scaled_dot_product_attention,
    aten.view.default: Tensor.view, aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose, aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze, aten.expand.default: Tensor.expand,
    aten.contiguous.default: Tensor.contiguous, aten.flatten.using_ints: torch.flatten,
    aten.select.int: torch.select, aten.where.self: torch.where, aten.sym_size.int: Tensor.size,
}  # fmt: skip


def eager_function(module: fx.GraphModule, graph: fx.Graph | None = None) -> Callable[..., tuple]:
    """A function with the arguments and outputs of the module's forward, or of another graph over
    its attributes."""
    return _written(_Writer(module), graph)


def traced_function(module: fx.GraphModule) -> Callable[..., tuple]:
    """The same for torch.compile, each time with a code object of its own."""
    return _written(_Writer(module, traced=True))


def _written(writer: _Writer, graph: fx.Graph | None = None) -> Callable[..., tuple]:
    graph = graph or writer.module.graph
    nodes = list(graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    lines = []
    for node in nodes:
        if node.op == "call_function":
            lines.append(f"{writer.name(node)} = {writer.called(node)}")
        elif node.op == "output":
            lines.append(f"return {writer.written(output_of(graph))}")
        elif node.op not in ("placeholder", "get_attr"):
            raise InvariantError(f"{node} in the code of a step: nothing runs a {node.op}")
        done = [s for s in node.all_input_nodes if last[s] is node and s.op != "get_attr"]
        if node.op == "call_function":
            done += [] if node.users else [node]
            lines += [f"del {', '.join(map(writer.name, done))}"] if done else []
    given = ", ".join(writer.name(n) for n in graph.find_nodes(op="placeholder"))
    body = "\n    ".join(lines)
    exec(compile(f"def run({given}):\n    {body}\n", "<a step>", "exec"), writer.space)  # noqa: S102
    return writer.space["run"]


class _Writer:
    """Expressions of nodes and constants. space: what they refer to by name. traced: call operators
    as torch.compile knows them."""

    def __init__(self, module: fx.GraphModule, traced: bool = False) -> None:
        self.module, self._traced = module, traced
        self.space: dict[str, Any] = {}
        self._names: dict[fx.Node, str] = {}
        self._known: dict[int, str] = {}

    def name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._constant(operator.attrgetter(str(node.target))(self.module))
        return self._names.setdefault(node, f"v{len(self._names)}")

    def called(self, node: fx.Node) -> str:
        target: Any = node.target
        if target is operator.getitem:
            whole, part = node.args
            return f"{self.written(whole)}[{self.written(part)}]"
        function = BINDINGS.get(target)
        if function is None:
            own = in_eager(target)
            function = target if self._traced else getattr(own, "_op", own)
        args = [self.written(a) for a in node.args]
        args += [f"{key}={self.written(value)}" for key, value in node.kwargs.items()]
        return f"{self._constant(function)}({', '.join(args)})"

    def written(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self.written(v)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.written(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self.written, parts))})"
        plain = value is None or type(value) in (bool, int, str)
        if plain or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = name = f"k{len(self._known)}"
            self.space[name] = value
        return self._known[id(value)]
