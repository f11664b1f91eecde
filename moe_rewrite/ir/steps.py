"""A program as a model runs it: one function a block, with weights and values as arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .program import Code, Numerics, Table


@dataclass(frozen=True)
class Step:
    """One block's part of a graph.

    block: name of the block.
    deep: whether it comes after the cut.
    code: function of the tensors in `owned` and the values in `takes`.
    owned: (kind, name) of the weights, buffers and expert parts that the code takes, in order.
    takes, gives: names of the values that it reads and returns.
    drops: names of values that no later step reads.
    writes: positions in `owned` followed by `takes` of the arguments it writes to in place.
    """

    block: str
    deep: bool
    code: Code
    owned: tuple[tuple[str, str], ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Emitted:
    """A program as the model runs it: steps up to the cut, views of the plan, steps after it.

    steps: in order.
    cut: name of the features that the router reads.
    mask: name of the input that masks their rows, or None.
    tables: values over pairs of rows that say which attends to which.
    views: (name of the value, view of the plan).
    outputs: names of values, or constants of the graph.
    constants: values of the graph's constants, by name.
    sizes: for each value that steps take or return, the sizes of its tensors (or the value itself
        if it is a size): numbers, or expressions of symbolic sizes.
    numerics: (pass, declared numerics).
    computed: dtypes of the floats that the graph computes.
    layers: (layer, name of the value) of the logits of layers that have routers of their own.
    """

    steps: tuple[Step, ...]
    cut: str
    mask: str | None
    tables: tuple[Table, ...]
    views: tuple[tuple[str, Any], ...]
    outputs: tuple[Any, ...]
    constants: dict[str, torch.Tensor]
    sizes: dict[str, tuple[tuple[Any, ...], ...]]
    numerics: tuple[tuple[str, Numerics], ...]
    computed: frozenset[torch.dtype]
    layers: tuple[tuple[str, str], ...] = ()


def narrowed(step: Step, wanted: set[str]) -> Step:
    """The part of a step that gives only these of its values, and takes only what they need."""
    gives = tuple(name for name in step.gives if name in wanted)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    made: Any = graph.graph_copy(step.code.module.graph, copies)
    graph.output(tuple(made[i] for i, name in enumerate(step.gives) if name in wanted))
    _erase_unneeded(graph)
    placeholders = list(graph.find_nodes(op="placeholder"))
    takes = []
    for name, node in zip(step.takes, placeholders[len(step.owned) :], strict=True):
        if node.users:
            takes.append(name)
        else:
            graph.erase_node(node)
    writes = tuple(i for i in step.writes if i < len(step.owned))
    code = Code(fx.GraphModule(step.code.module, graph))  # with the submodules that it calls
    return replace(step, code=code, takes=tuple(takes), gives=gives, drops=(), writes=writes)


def _erase_unneeded(graph: fx.Graph) -> None:
    """Erase all that the output does not depend on; fx itself would keep random operators."""
    needed: set[fx.Node] = set()
    waiting = [graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in reversed(graph.nodes):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)


@dataclass(frozen=True)
class _Constant:
    """An output that is not a value of the graph (None, an int)."""

    value: Any
