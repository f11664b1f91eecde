"""The dynamic sizes of a functional call: which they are, their names, and calls to find them."""

from __future__ import annotations

import random
from typing import Any

import sympy
import torch

from ...errors import CaptureError
from .functional import FunctionalModel

LONGEST = 1200  # largest size in the second call
TRACED_EXPERTS = 3  # experts in a trace: torch.export specializes 0 and 1
Call = tuple[list[torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]
Dims = list[int | str]


def two_calls(functional: FunctionalModel) -> tuple[Call, Call]:
    """The call that is traced, and one in which every dynamic size differs. Instead of the stacks,
    both have zeros that take no memory."""
    others = other_leaves(functional)
    state, other_state = (
        functional.state(len(leaves[0])) for leaves in (functional.example, others)
    )
    return (
        (functional.example, _with_experts(functional, TRACED_EXPERTS), state),
        (others, _with_experts(functional, TRACED_EXPERTS + 1), other_state),
    )


def other_leaves(functional: FunctionalModel) -> list[torch.Tensor]:
    """Leaves with which every dynamic size differs from the example's; as small as possible."""
    known = {size for leaf in functional.example for size in leaf.shape}
    free = [n for n in range(2, LONGEST) if n not in known]
    opened = {s for of in functional.graph.emitted.sizes.values() for each in of for s in each}
    opened = {s for s in opened if isinstance(s, sympy.Expr) and not s.is_number}
    here = _at(functional, functional.example)
    best: tuple[int, list[torch.Tensor]] | None = None
    for first in (0, *(2**i for i in range(2, LONGEST.bit_length() - 1))):
        leaves = zeros(functional, *free[first : first + 3])
        there = _at(functional, leaves)
        same = sum(size.xreplace(here) == size.xreplace(there) for size in opened)
        if best is None or same < best[0]:
            best = same, leaves
        if not same:
            break
    assert best is not None
    return best[1]


def _at(functional: FunctionalModel, leaves: list[torch.Tensor]) -> dict[Any, sympy.Integer]:
    """The values of the capture's symbols in a call with these leaves."""
    of = functional.graph.emitted.sizes
    return {
        symbol: sympy.Integer(size)
        for name, leaf in zip(functional.graph.conditions.leaves, leaves, strict=True)
        for symbols in of.get(name, ())
        for symbol, size in zip(symbols, leaf.shape, strict=True)
        if isinstance(symbol, sympy.Symbol)
    }


def require_any_size(functional: FunctionalModel) -> None:
    """Raises CaptureError where the graph holds for some sizes only, bounds left out, or for some
    values: a file has one graph."""
    if not any(0 in dims for dims in functional.open):
        batch = functional.example[0].shape[0]
        raise CaptureError(
            f"a file holds one graph, and in this one the batch is a constant ({batch} samples, as "
            "traced): the model's code makes a Python number of it, by len(x) or int(x.shape[0]). "
            "Write x.shape[0] or x.size(0), or run the converted model in PyTorch, which takes any "
            "batch"
        )
    conditions, draw = functional.graph.conditions, random.Random(0)
    if conditions.values:
        raise CaptureError(
            "a file holds one graph, and the model's code branches on values of a call: "
            f"{conditions.values[0].words}. Write the branch with tensor operations (torch.where), "
            "or run the converted model in PyTorch"
        )
    for _ in range(64):
        batch, length, past = (draw.randint(2, 2 ** draw.randint(2, 7)) for _ in range(3))
        leaves = zeros(functional, batch, length, past)
        bounds = conditions.largest.items()
        if any(leaves[leaf].shape[dim] > size for (leaf, dim), size in bounds):
            continue
        if (violated := conditions.violated(leaves)) is not None:
            raise CaptureError(
                f"a file holds one graph, and for some sizes the model's code takes another branch: "
                f"{violated}. Write the branch with tensor operations (torch.where), or run the "
                "converted model in PyTorch"
            )


def zeros(functional: FunctionalModel, batch: int, length: int, past: int) -> list[torch.Tensor]:
    """Leaves of zeros with these sizes in their dynamic dimensions."""
    made = []
    for name, cached, like, dims in zip(
        functional.inputs, functional.cached, functional.example, functional.open, strict=True
    ):
        shape = list(like.shape)
        for d in dims:
            if d == 0:
                shape[d] = batch
            elif cached:
                shape[d] = past
            else:
                shape[d] = length + (past if any(functional.cached) and "mask" in name else 0)
        made.append(like.new_zeros(shape))
    return made


def _with_experts(functional: FunctionalModel, count: int) -> dict[str, torch.Tensor]:
    shapes = {n: _stack_shape(functional, n, count) for n in functional.stacks}
    zeros = {n: functional.tensors[n].new_zeros(()).expand(shape) for n, shape in shapes.items()}
    return functional.tensors | zeros


def to_trace(functional: FunctionalModel) -> dict[str, torch.Tensor]:
    """All tensors, with empty stacks of TRACED_EXPERTS experts instead of the real ones: a trace
    reads no values."""
    empty = {
        n: t.new_empty(_stack_shape(functional, n, TRACED_EXPERTS))
        for n, t in functional.tensors.items()
        if n in functional.stacks
    }
    return functional.tensors | empty


def _stack_shape(functional: FunctionalModel, name: str, count: int) -> list[int]:
    shape, stack = list(functional.tensors[name].shape), functional.stacks[name]
    shape[stack.dim] = count * stack.each
    return shape


def size_words(functional: FunctionalModel) -> dict[Any, str]:
    """Names of dynamic sizes, by the capture's symbol, or by the pair of sizes in `two_calls` for
    those that the capture does not know (a router's)."""
    words: dict[Any, str] = {}
    of = functional.graph.emitted.sizes
    leaves = zip(
        functional.graph.conditions.leaves,
        functional.example,
        other_leaves(functional),
        _leaf_dims(functional),
        strict=True,
    )
    for name, leaf, other, dims in leaves:
        symbols = next(iter(of.get(name, ())), (None,) * leaf.ndim)
        for *sizes, symbol, word in zip(leaf.shape, other.shape, symbols, dims, strict=True):
            if isinstance(word, str):
                words.setdefault((sizes[0], sizes[1]), word)
                words.setdefault(symbol, word)
    return words


def input_dims(functional: FunctionalModel) -> dict[str, Dims]:
    """Shapes of the graph's inputs by name: leaves, tensors and state. Dynamic sizes have names:
    ``batch``, ``sequence`` and so on."""
    dims: dict[str, Dims] = dict(zip(functional.inputs, _leaf_dims(functional), strict=True))
    for name, tensor in functional.tensors.items():
        dims[name] = list(tensor.shape)
        if name in functional.stacks:
            stack = functional.stacks[name]
            dims[name][stack.dim] = "experts" if stack.each == 1 else f"{stack.each}*experts"
    for name, tensor in zip(functional.past, functional.state(1), strict=True):
        dims[name] = ["batch", *tensor.shape[1:]]
    return dims


def _leaf_dims(functional: FunctionalModel) -> list[Dims]:
    with_cache = any(functional.cached)
    first = functional.graph.conditions.same_as
    words: dict[Any, str] = {}
    of_each = zip(functional.inputs, functional.cached, functional.open, strict=True)
    for i, (name, cached, dims) in enumerate(of_each):
        taken = set(words.values())
        for d in dims:
            place = first.get((i, d), (i, d))
            word = "past" if cached and d else _word(name, d, with_cache)
            words.setdefault(place, word if word not in taken or with_cache else f"{name}_{d}")
            taken.add(words[place])
    return [
        [words[first.get((i, d), (i, d))] if d in dims else size for d, size in enumerate(t.shape)]
        for i, (t, dims) in enumerate(zip(functional.example, functional.open, strict=True))
    ]


def _word(name: str, dim: int, with_cache: bool) -> str:
    if dim == 0:
        return "batch"
    if with_cache and "mask" in name:
        return "past + sequence"
    return {1: "sequence"}.get(dim, f"{name}_{dim}")
