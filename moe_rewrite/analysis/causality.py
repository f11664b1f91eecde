"""Which rows of a model depend on which: tested by changing some at the cut and running its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..frontend.arguments import split_static
from ..frontend.example_inputs import random_arguments
from ..frontend.host import Host
from ..ir.aten import expression, value
from ..ir.ops import alias_root, mutated, output_of
from ..ir.program import Program


@torch.no_grad()
def is_causal(program: Program, host: Host, arguments: dict[str, Any]) -> bool:
    """Whether gates must not read rows after their own.

    False only with evidence: an output at an earlier row changed with the last row at the cut, or
    no output has rows (one output a sample). Otherwise a model counts as causal, since gates that
    only look back are correct for every model. On the meta device nothing can be run, so the
    model's own declaration is used.
    """
    assert program.cut is not None
    if any(p.is_meta for p in host.module.parameters()):
        return host.declares_causal(program.cut.rows)
    try:
        run = _Run(program, host, random_arguments(arguments, host.vocabulary()))
        before, again, changed = run.outputs(), run.outputs(), run.outputs(LAST_ROW)
    except (IndexError, RuntimeError, ValueError):
        return True
    if not before:
        return False
    same = all(torch.equal(a, b) for a, b in zip(before, again, strict=True))  # deterministic
    return not same or all(
        _close(a[:, :-1], b[:, :-1]) for a, b in zip(before, changed, strict=True)
    )


@torch.no_grad()
def has_positions_first(program: Program, host: Host, arguments: dict[str, Any]) -> bool:
    """Whether the first dimension at the cut (B, S, D) holds positions, the second one samples.

    True only with evidence: in the deep segment's last value with these rows, others along the first
    dimension depend on the first one, and none does along the second (nn.LSTM without batch_first).
    """
    assert program.cut is not None
    if any(p.is_meta for p in host.module.parameters()):
        return False
    run = _Run(program, host, random_arguments(arguments, host.vocabulary()))

    def reaches(change: Any, others: Any) -> bool:
        before, changed = run.last_rows(), run.last_rows(change)
        return not _close(before[others], changed[others])

    try:
        return (
            reaches(FIRST_SAMPLE, slice(1, None))
            and not reaches(FIRST_ROW, (slice(None), slice(1, None)))
            and not reaches(None, ...)  # nor does anything random
        )
    except (IndexError, RuntimeError, ValueError):
        return False


LAST_ROW, FIRST_ROW, FIRST_SAMPLE = (slice(None), -1), (slice(None), 0), (0,)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


class _Run(fx.Interpreter):
    """Runs the program on one call, with copies of what it may write to."""

    def __init__(self, program: Program, host: Host, arguments: dict[str, Any]) -> None:
        super().__init__(program.root, graph=program.graph)
        assert program.cut is not None
        self.program, self.cut = program, program.cut.node
        self.tensors = dict([*host.module.named_parameters(), *host.module.named_buffers()])
        self.leaves = pytree.tree_leaves(split_static(arguments)[0])
        lead = value(program.node(self.cut)).shape[:2]
        self.written = {alias_root(w) for n in program.graph.nodes for w in mutated(n)}
        returned = pytree.tree_leaves(output_of(program.graph))
        self.with_rows = [_may_hold_rows(n, lead) for n in returned]
        nodes = list(program.graph.nodes)
        deep = nodes[nodes.index(program.node(self.cut)) + 1 :]
        self.last = next((n.name for n in reversed(deep) if _may_hold_rows(n, lead)), None)
        self.change: Any = None
        self.rows, self.at_last = torch.Size(), cast(torch.Tensor | None, None)

    def outputs(self, change: Any = None) -> list[torch.Tensor]:
        """Outputs with a value for each row at the cut. change: the rows that are replaced."""
        made = pytree.tree_leaves(self._values(change))
        tensors = [t for t, rows in zip(made, self.with_rows, strict=True) if rows]
        return [t.clone() for t in tensors if t.shape[:2] == self.rows]

    def last_rows(self, change: Any = None) -> torch.Tensor:
        """The deep segment's last value with these rows. Raises ValueError if there is none."""
        self._values(change)
        if self.at_last is None or self.at_last.shape[:2] != self.rows:
            raise ValueError("no value has the rows at the cut")
        return self.at_last

    def _values(self, change: Any) -> Any:
        self.change, users, given = change, iter(self.leaves), []
        for node in self.program.graph.find_nodes(op="placeholder"):
            of = self.program.inputs[node.name]
            if of.kind in ("user", "cache"):
                tensor = next(users)
            else:
                tensor = (
                    self.program.constants[of.name]
                    if of.kind == "constant"
                    else self.tensors[of.name]
                )
            given.append(tensor.clone() if of.kind != "weight" or node in self.written else tensor)
        return self.run(*given)

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.name == self.cut:
            self.rows = made.shape[:2]
            if self.change is not None:
                made = made.clone()
                made[self.change] = 1.0 - 2.0 * made[self.change]
        elif n.name == self.last:
            self.at_last = made.clone()
        return made


def _may_hold_rows(returned: Any, lead: Sequence[Any]) -> bool:
    """Whether the first two sizes of what a graph returns depend on those at the cut, so that they
    do not just coincide with them in one call."""
    made = value(returned) if isinstance(returned, fx.Node) else None
    if not isinstance(made, torch.Tensor) or not made.is_floating_point() or made.ndim < 2:
        return False
    pairs = zip(made.shape[:2], lead, strict=True)
    return all(_symbols(size) >= _symbols(of) for size, of in pairs)


def _symbols(size: Any) -> set[Any]:
    return getattr(expression(size), "free_symbols", set())
