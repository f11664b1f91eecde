"""Names of symbolic sizes, and the FLOPs of nodes on one sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import argument, op, op_name
from ..ir.program import Program

if TYPE_CHECKING:
    import sympy


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
        self._batch = 1  # the batch size where it is not symbolic
        self._known: dict[sympy.Expr, int] = {}
        self._at: dict[sympy.Symbol, sympy.Integer] = {}
        for leaf in program.leaves():
            for dim, size in enumerate(value(leaf).shape):
                symbol = expression(size)
                if dim == 0:
                    self._batch = size if isinstance(size, int) else 1
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
        if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
            return 0

        def numel(tensor: torch.Tensor) -> int:
            return math.prod(map(self.of_sample, tensor.shape))

        out, of = numel(value(node)), op(node)
        if of.product == "filter":
            return (
                2 * out * math.prod(map(self.of_sample, value(argument(node, "weight")).shape[1:]))
            )
        if of.summed:
            return 2 * out * self.of_sample(value(argument(node, of.summed)).shape[-1])
        if op_name(node) == "scaled_dot_product_attention":
            query, key = (value(argument(node, name)) for name in ("query", "key"))
            return 2 * self.of_sample(key.shape[-2]) * (numel(query) + out)
        return 0
