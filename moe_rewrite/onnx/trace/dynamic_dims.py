"""The sizes of a plain call: which are open, what they are called, and calls to tell them by."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ...ir.program import CACHE
from .functional import Plain

LONGEST = 1200  # size of a call that others are told by
TRACED_EXPERTS = 3  # of a trace: export takes 0 and 1 for constants
Call = tuple[list[torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]
Dims = list[int | str]


def two_calls(plain: Plain) -> tuple[Call, Call]:
    """The one that is traced, and one in which each open size is another one; in the place of stacks
    are zeros that take no memory."""
    others = other_leaves(plain)
    state, other_state = (plain.state(len(leaves[0])) for leaves in (plain.example, others))
    return (
        (plain.example, _with_experts(plain, TRACED_EXPERTS), state),
        (others, _with_experts(plain, TRACED_EXPERTS + 1), other_state),
    )


def other_leaves(plain: Plain) -> list[torch.Tensor]:
    """Of sizes by which everything open differs from the example's, where small ones do that."""
    known = {size for leaf in plain.example for size in leaf.shape}
    free = [n for n in range(2, LONGEST) if n not in known]
    opened = {s for of in plain.graph.emitted.sizes.values() for each in of for s in each}
    opened = {s for s in opened if isinstance(s, sympy.Expr) and not s.is_number}
    here = _at(plain, plain.example)
    best: tuple[int, list[torch.Tensor]] | None = None
    for first in (0, *(2**i for i in range(2, LONGEST.bit_length() - 1))):
        leaves = zeros(plain, *free[first : first + 3])
        there = _at(plain, leaves)
        same = sum(size.xreplace(here) == size.xreplace(there) for size in opened)
        if best is None or same < best[0]:
            best = same, leaves
        if not same:
            break
    assert best is not None
    return best[1]


def _at(plain: Plain, leaves: list[torch.Tensor]) -> dict[Any, sympy.Integer]:
    """The symbols of the capture's sizes, in a call of these leaves."""
    of = plain.graph.emitted.sizes
    return {
        symbol: sympy.Integer(size)
        for name, leaf in zip(plain.graph.leaves, leaves, strict=True)
        for symbols in of.get(name, ())
        for symbol, size in zip(symbols, leaf.shape, strict=True)
        if isinstance(symbol, sympy.Symbol)
    }


def zeros(plain: Plain, batch: int, length: int, past: int) -> list[torch.Tensor]:
    """Leaves of these sizes."""
    cached = any(n.startswith(CACHE) for n in plain.inputs)
    made = []
    for name, like, dims in zip(plain.inputs, plain.example, plain.open, strict=True):
        shape = list(like.shape)
        for d in dims:
            if d == 0:
                shape[d] = batch
            elif name.startswith(CACHE):
                shape[d] = past
            else:
                shape[d] = length + (past if cached and "mask" in name else 0)
        made.append(like.new_zeros(shape))
    return made


def _with_experts(plain: Plain, count: int) -> dict[str, torch.Tensor]:
    shapes = {n: _stack_shape(plain, n, count) for n in plain.stacks}
    zeros = {n: plain.tensors[n].new_zeros(()).expand(shape) for n, shape in shapes.items()}
    return plain.tensors | zeros


def to_trace(plain: Plain) -> dict[str, torch.Tensor]:
    """All tensors, but in the place of stacks such of TRACED_EXPERTS experts, laid out as the stacks
    are, whose values are never read."""
    empty = {
        n: t.new_empty(_stack_shape(plain, n, TRACED_EXPERTS))
        for n, t in plain.tensors.items()
        if n in plain.stacks
    }
    return plain.tensors | empty


def _stack_shape(plain: Plain, name: str, count: int) -> list[int]:
    shape, stack = list(plain.tensors[name].shape), plain.stacks[name]
    shape[stack.dim] = count * stack.each
    return shape


def size_words(plain: Plain) -> dict[Any, str]:
    """What a size of the capture is called, by its symbol; and one that the capture does not know,
    a router's, that is these two in the two calls."""
    words: dict[Any, str] = {}
    of = plain.graph.emitted.sizes
    leaves = zip(
        plain.graph.leaves, plain.example, other_leaves(plain), _leaf_dims(plain), strict=True
    )
    for name, leaf, other, dims in leaves:
        symbols = next(iter(of.get(name, ())), (None,) * leaf.ndim)
        for *sizes, symbol, word in zip(leaf.shape, other.shape, symbols, dims, strict=True):
            if isinstance(word, str):
                words.setdefault((sizes[0], sizes[1]), word)
                words.setdefault(symbol, word)
    return words


def input_dims(plain: Plain) -> dict[str, Dims]:
    """By name the sizes of all that the graph takes: leaves, tensors and state; words for those that
    are open: ``batch``, ``sequence`` and the like."""
    dims: dict[str, Dims] = dict(zip(plain.inputs, _leaf_dims(plain), strict=True))
    for name, tensor in plain.tensors.items():
        dims[name] = list(tensor.shape)
        if name in plain.stacks:
            stack = plain.stacks[name]
            dims[name][stack.dim] = "experts" if stack.each == 1 else f"{stack.each}*experts"
    for name, tensor in zip(plain.past, plain.state(1), strict=True):
        dims[name] = ["batch", *tensor.shape[1:]]
    return dims


def _leaf_dims(plain: Plain) -> list[Dims]:
    cached = any(n.startswith(CACHE) for n in plain.inputs)
    first = {place: tied[0] for tied in plain.graph.ties for place in tied}
    words: dict[Any, str] = {}
    for i, (name, dims) in enumerate(zip(plain.inputs, plain.open, strict=True)):
        taken = set(words.values())
        for d in dims:
            place = first.get((i, d), (i, d))
            word = _word(name, d, cached)
            words.setdefault(place, word if word not in taken or cached else f"{name}_{d}")
            taken.add(words[place])
    return [
        [words[first.get((i, d), (i, d))] if d in dims else size for d, size in enumerate(t.shape)]
        for i, (t, dims) in enumerate(zip(plain.example, plain.open, strict=True))
    ]


def _word(name: str, dim: int, cached: bool) -> str:
    if dim == 0:
        return "batch"
    if cached and name.startswith(CACHE):
        return "past"
    if cached and "mask" in name:
        return "past + sequence"
    return {1: "sequence"}.get(dim, f"{name}_{dim}")
