"""A graph's steps as generated functions for calls without gradients: LoRA experts as the few
operators that they are, on matrices of rows, without the calls and the views around them. For one
token these take longer than the products. The same bits as `lora_linear`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...experts.lora.parameters import LoRAParameters
from ...ir.ops import mutated
from ...ir.program import Code
from ...kernels.lora.op import lora_linear_unchecked
from ...kernels.lora.stacked import rows_and_scales
from .block_module import Bound
from .eager_code import eager_function
from .flat_code import FlatCode, eager

Pair = tuple[fx.Node, fx.Node]  # the placeholders of a site's A and B


class InferenceCode(FlatCode):
    """`FlatCode` for calls without gradients and autocast, in which some expert runs. differs: from
    `FlatCode`."""

    differs = False

    def _called(self, bound: Bound) -> Callable:
        return _rows_code(bound).run

    def _owned_by(self, bound: Bound, lines: list[str]) -> list[str]:
        code, taken = _rows_code(bound), []
        self.differs |= bool(code.factors)
        for a, _ in code.factors:
            site, _ = bound.slots[a]
            at = self._position(self._sites, site)
            lines.append(f"r{at} = s{at}.transposed(active.run)")
            taken += [f"r{at}[0]", f"r{at}[1]"]
        return taken + [self._owned(bound.slots[i], lines) for i in code.kept]


@dataclass(frozen=True)
class RowsCode:
    """run: function of A and B, transposed, of some sites, then of what the step owns, then of its
    values.

    factors: positions, in what the step owns, of these sites' A and B.
    kept: positions of what is taken besides.
    """

    run: Callable[..., tuple]
    factors: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]


def _rows_code(bound: Bound) -> RowsCode:
    """One for all steps that share the code."""
    code = bound.step.code
    if code.rows is None:
        linear = [isinstance(s, tuple) and isinstance(s[0], LoRAParameters) for s in bound.slots]
        code.rows = _spelled_out(code, linear)
    return code.rows


def _spelled_out(code: Code, of_lora: list[bool]) -> RowsCode:
    """of_lora: of each tensor that a step owns, whether it is a factor of LoRA experts."""
    calls = code.module.graph.find_nodes(op="call_function", target=lora_linear_unchecked)
    if not calls:
        return RowsCode(eager(code), (), tuple(range(len(of_lora))))
    graph = fx.Graph()
    graph.output(graph.graph_copy(code.module.graph, {}))
    owned = list(graph.find_nodes(op="placeholder"))[: len(of_lora)]
    known = {node for node, lora in zip(owned, of_lora, strict=True) if lora}
    factors: dict[Pair, Pair] = {}
    laid: dict[Pair, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if mutated(node):  # rows may be a copy of what it writes to
            laid.clear()
        if node.target is not lora_linear_unchecked:
            continue
        x, _, _, scales, *pair = node.args
        if not known.issuperset(pair):
            continue
        a, b = pair
        if (a, b) not in factors:
            with graph.inserting_before(owned[0]):
                factors[a, b] = tuple(graph.placeholder(f"{part.name}_t") for part in pair)  # type: ignore[assignment]
        if (x, scales) not in laid:
            with graph.inserting_before(node):
                both = graph.call_function(rows_and_scales, (x, scales))
                laid[x, scales] = [graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
        _spell_out(graph, node, laid[x, scales], factors[a, b])
    places = {node: i for i, node in enumerate(owned)}
    for part in {part for pair in factors for part in pair if not part.users}:
        graph.erase_node(part)
    left = set(graph.find_nodes(op="placeholder"))
    return RowsCode(
        eager_function(code.module, graph),
        tuple((places[a], places[b]) for a, b in factors),
        tuple(i for node, i in places.items() if node in left),
    )


def _spell_out(graph: fx.Graph, node: fx.Node, laid: list[fx.Node], factors: Pair) -> None:
    """Replace the call of a site by its operators."""
    x, weight, bias, *_ = node.args
    (rows, scales), (down, up) = laid, factors
    with graph.inserting_before(node):
        y = graph.call_function(torch.ops.aten.linear.default, (x, weight, bias))
        low = graph.call_function(
            Tensor.mul_, (graph.call_function(torch.mm, (rows, down)), scales)
        )
        flat = graph.call_function(Tensor.flatten, (y, 0, -2))
        graph.call_function(Tensor.addmm_, (flat, low, up))
    node.replace_all_uses_with(y)
    graph.erase_node(node)
