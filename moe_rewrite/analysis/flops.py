"""Names of symbolic sizes, and the FLOPs of nodes on one sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, first, op, op_name, takes
from ..ir.program import Program
from .convolutions import is_transposed

if TYPE_CHECKING:
    import sympy

RECURRENT = {
    "rnn_tanh", "rnn_relu", "gru", "lstm", "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell",
}  # fmt: skip
COUNTED = {"einsum", "tensordot", "inner"}  # by PyTorch's own counter


def hint(size: Any) -> int:
    """A size as an int: a symbolic one at the example's values."""
    return size if isinstance(size, int) else int(size.node.hint)


def numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(s) for s in tensor.shape)


class Sizes:
    """The symbolic sizes of a program's inputs.

    words: the name of each, ``batch`` and ``sequence`` first.
    lengths: for those except the batch, the value at which FLOPs are counted.
    """

    def __init__(self, program: Program) -> None:
        from sympy import Integer, Symbol

        self.words: dict[sympy.Symbol, str] = {}
        self.lengths: dict[str, int] = {}
        leads = [expression(value(n).shape[0]) for n in program.leaves() if value(n).ndim]
        static = [int(size) for size in leads if isinstance(size, (int, Integer))]
        # the batch size where it is not symbolic
        self._batch = static[0] if static and len(static) == len(leads) else 1
        self._known: dict[sympy.Expr, int] = {}
        self._at: dict[sympy.Symbol, sympy.Integer] = {}
        for leaf in program.leaves():
            for dim, size in enumerate(value(leaf).shape):
                symbol = expression(size)
                if not isinstance(symbol, Symbol) or symbol in self.words:
                    continue
                word = {0: "batch", 1: "sequence"}.get(dim, "")
                if not word or word in self.words.values():
                    word = f"{leaf.name}_{dim}"
                self.words[symbol] = word
                self._at[symbol] = Integer(hint(size) if dim else 1)
                if dim:
                    self.lengths[word] = hint(size)
        self._called = {symbol: Symbol(word) for symbol, word in self.words.items()}

    def word(self, size: Any) -> str:
        return str(size if isinstance(size, int) else expression(size).xreplace(self._called))

    def of_sample(self, size: Any) -> int:
        """A size for one sample; a data-dependent size counts as 1."""
        if isinstance(size, int):
            return size
        symbolic = expression(size)
        if symbolic not in self._known:
            made = symbolic.xreplace(self._at)
            self._known[symbolic] = int(made) if made.is_number else 1
        return self._known[symbolic]

    def flops(self, nodes: list[fx.Node]) -> int:
        """Two per multiply-add of the products in these nodes, on one sample; other operations are
        not counted."""
        return sum(map(self._flops, nodes)) // max(self._batch, 1)

    def _flops(self, node: fx.Node) -> int:
        if node.op != "call_function" or value(node) is None:
            return 0
        of, name = op(node), op_name(node) if _is_aten(node) else ""
        if of.product == "filter" or name == "bilinear":
            scattered = of.product == "filter" and is_transposed(node)
            rows = first(node) if scattered else node
            return self._each_with_a_row(rows, argument(node, "weight"))
        if name in RECURRENT:
            return self._recurrent(node)
        if of.summed:
            summed = self._shape(argument(node, of.summed))[-1]
            return 2 * math.prod(self._shape(node)) * summed
        if name == "scaled_dot_product_attention":
            query, key = (self._shape(argument(node, name)) for name in ("query", "key"))
            return 2 * key[-2] * (math.prod(query) + math.prod(self._shape(node)))
        return self._counted(node) if name in COUNTED else 0

    def _shape(self, node: fx.Node) -> list[int]:
        return [*map(self.of_sample, value(node).shape)]

    def _each_with_a_row(self, node: fx.Node, weight: fx.Node) -> int:
        """Each element of this value takes part in as many multiply-adds as the weight has elements
        for one index of its first dimension."""
        return 2 * math.prod(self._shape(node)) * math.prod(self._shape(weight)[1:])

    def _recurrent(self, node: fx.Node) -> int:
        """Each row of the input, and of the state at that row, is multiplied with every matrix."""
        if takes(node, "params"):
            weights = argument(node, "params")
        else:
            weights = [argument(node, name) for name in ("w_ih", "w_hh")]
        shapes = [shape for w in weights if len(shape := self._shape(w)) == 2]
        return 2 * math.prod(self._shape(first(node))[:-1]) * sum(map(math.prod, shapes))

    def _counted(self, node: fx.Node) -> int:
        """By PyTorch, from a run without values."""

        def empty(given: fx.Node) -> torch.Tensor:
            return torch.empty(self._shape(given), dtype=value(given).dtype, device="meta")

        from torch.utils.flop_counter import FlopCounterMode  # imports triton

        args, kwargs = fx.map_arg((node.args, node.kwargs), empty)
        target: Any = node.target
        with FlopCounterMode(display=False) as counter:
            target(*args, **kwargs)
        return counter.get_total_flops()


def _is_aten(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "aten"
