"""The sizes of a plain call: which are open, what they are called, and calls to tell them by."""

from __future__ import annotations

from typing import Any

import torch

from ..program import CACHE
from .plain import Plain

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
    known = {size for leaf in plain.example for size in leaf.shape}
    batch, length, past = [n for n in range(2, len(known) + 5) if n not in known][:3]
    return zeros(plain, batch, length, past)


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


def size_words(plain: Plain) -> dict[tuple[int, int], str]:
    """What a size is called that is these two in the two calls."""
    words: dict[tuple[int, int], str] = {}
    leaves = zip(plain.example, other_leaves(plain), _leaf_dims(plain), strict=True)
    for leaf, other, dims in leaves:
        for *sizes, word in zip(leaf.shape, other.shape, dims, strict=True):
            if isinstance(word, str):
                words.setdefault((sizes[0], sizes[1]), word)
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
