"""LoRA experts beside weights of which each process has a part (tensor parallel).

Every process holds whole experts and gates, and computes with the rows of B, or the columns of A,
that go with its part; the gradients of all of them are sums over the processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..frontend.tracing.own_gradients import function_of
from ..frontend.weights.divided_layers import Part
from ..ir.ops import first
from ..ir.program import Program
from ..routing.dispatch import RowGates
from ..routing.plan_views import view_plan
from ..utils.collectives import Copied
from .base import Decisions, Pass

DIVIDES = {"a": 1, "b": 0}  # the part of an expert -> the dimension of weights whose part it takes


@dataclass(frozen=True)
class DividedCall:
    """The target of a node in which experts work beside a part of a weight.

    inner: what it calls with the same arguments.
    shared: positions of gates, and of those factors of the experts that are whole.
    cut: position of the factor of which this process's part is taken, along the dimension of `part`.
    """

    inner: Any
    shared: tuple[int, ...]
    cut: int
    part: Part

    __module__, __qualname__, __name__ = __name__, "DividedCall", "divided_call"

    def __deepcopy__(self, memo: dict) -> DividedCall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def __call__(self, *args: Any) -> Any:
        given = list(args)
        for i in (*self.shared, self.cut):
            given[i] = self._of(given[i], i == self.cut)
        return self.inner(*given)

    def _of(self, value: Any, cut: bool) -> Any:
        if value is None:
            return None
        if isinstance(value, RowGates):
            return replace(value, gates=self._of(value.gates, cut))
        if isinstance(value, (list, tuple)):
            return [self._of(v, cut) for v in value]
        part = self.part
        whole: torch.Tensor = Copied.apply(value, part.group) if value.requires_grad else value
        return whole.narrow(part.dim, part.start, part.stop - part.start) if cut else whole


@dataclass(frozen=True)
class DivideExperts(Pass):
    """Reordered: sums over the processes. Leaves out calls of `Copied` on the same tensor.

    parts: of the divided weights, by state-dict name.
    """

    parts: Mapping[str, Part]
    name = "divide experts"
    numerics = "reordered"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        weights = {site.name: site.weight for site in program.sites}  # type: ignore[union-attr]
        used: dict[fx.Node, dict[str, fx.Node]] = {}  # node -> its experts' factors, by part
        at: dict[fx.Node, Part] = {}
        for given in program.graph.find_nodes(op="placeholder"):
            of = program.inputs[given.name]
            site, _, factor = of.name.rpartition(":")
            if of.kind == "expert" and (part := self.parts.get(weights[site])) is not None:
                for node in given.users:
                    used.setdefault(node, {})[factor] = given
                    at[node] = part
        _copy_once(program.graph)
        for node, factors in used.items():
            node.target = _divided(node, factors, at[node])
        return self.done(program)


def _copy_once(graph: fx.Graph) -> None:
    """Layers that read the same input (of a query, a key and a value) have its gradient summed over
    the processes once."""
    copied: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and function_of(node) is Copied:
            once = copied.setdefault(first(node), node)
            if once is not node:
                node.replace_all_uses_with(once)
                graph.erase_node(node)


def _divided(node: fx.Node, factors: dict[str, fx.Node], part: Part) -> DividedCall:
    cut = next(f for f, dim in DIVIDES.items() if dim == part.dim)
    whole = [factor for name, factor in factors.items() if name != cut]
    shared = tuple(
        i for i, given in enumerate(node.args)
        if isinstance(given, fx.Node) and (given.target is view_plan or given in whole)
    )  # fmt: skip
    return DividedCall(node.target, shared, node.args.index(factors[cut]), part)
