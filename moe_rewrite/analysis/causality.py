"""Whether a model is causal: tested by changing the last row at the cut and running its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        before, again, changed = run.outputs(), run.outputs(), run.outputs(changed=True)
    except (IndexError, RuntimeError, ValueError):
        return True
    if not before:
        return False
    same = all(torch.equal(a, b) for a, b in zip(before, again, strict=True))  # deterministic
    return not same or all(
        torch.allclose(a[:, :-1], b[:, :-1], rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(before, changed, strict=True)
    )


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
        self.changed, self.rows = False, torch.Size()

    def outputs(self, changed: bool = False) -> list[torch.Tensor]:
        """Outputs with a value for each row at the cut. changed: with the last row replaced."""
        self.changed, users, given = changed, iter(self.leaves), []
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
        made = pytree.tree_leaves(self.run(*given))
        tensors = [t for t, rows in zip(made, self.with_rows, strict=True) if rows]
        return [t.clone() for t in tensors if t.shape[:2] == self.rows]

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.name == self.cut:
            self.rows = made.shape[:2]
            if self.changed:
                made = made.clone()
                made[:, -1] = 1.0 - 2.0 * made[:, -1]
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
