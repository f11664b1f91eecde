"""Branches of a model's code on values of a call's tensors (``if mask.any():``), in a trace.

A trace knows sizes and no values. Where the code branches on a number that is computed from the
call's tensors alone, the operations traced so far are run on the tensors of the call that the graph
is made for; which way it went is a condition of the graph. A number that depends on weights is not
known before the call, and stays an error of the trace.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ...ir.aten import expression, value
from ...ir.call_values import CallValue
from ...ir.dependencies import needed_for
from ...ir.ops import alias_root, is_random, mutated
from ...ir.structural_key import structural_key

# what this uses of PyTorch that is not its public interface; in a version without, such a branch is
# an error of the trace
KNOWN = all(
    hasattr(proxy_tensor, name)
    for name in ("get_proxy_mode", "get_proxy_slot", "disable_proxy_modes_tracing")
)


@dataclass
class ValueBranches:
    """Those of one trace. given: the real leaves of the call. files: those of the model's code.

    values: the numbers that were branched on, by what computes them. relations: what they met.
    """

    given: list[Any]
    files: frozenset[str]
    values: dict[tuple, CallValue] = field(default_factory=dict)
    relations: dict[Any, None] = field(default_factory=dict)
    _numbers: dict[CallValue, int | float] = field(default_factory=dict)
    _read: dict[Any, CallValue] = field(default_factory=dict)
    _tracer: Any = None
    _places: dict[fx.Node, int] = field(default_factory=dict)
    _sizes: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(cls, traced: dict[str, Any], model: nn.Module) -> ValueBranches:
        """traced: the call's arguments that are inputs of the graph."""
        kinds = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}
        codes = (getattr(kind.forward, "__code__", None) for kind in kinds)
        files = frozenset(code.co_filename for code in codes if code is not None)
        return cls(pytree.tree_leaves(traced), files)

    def start(self, arguments: Mapping[str, Any]) -> None:
        """The forward of a trace begins. arguments: as it is given them, fake."""
        mode = proxy_tensor.get_proxy_mode() if KNOWN else None
        if mode is None:
            return
        self._tracer = mode.tracer
        for i, leaf in enumerate(pytree.tree_leaves(arguments)):
            if not isinstance(leaf, torch.Tensor):
                continue
            self._places[proxy_tensor.get_proxy_slot(leaf, mode.tracer).proxy.node] = i
            real = self.given[i].shape
            self._sizes |= {expression(s): int(r) for s, r in zip(leaf.shape, real, strict=True)}

    @contextmanager
    def answering(self) -> Iterator[None]:
        """In this context, a trace asks here where its own knowledge of sizes has no answer."""
        from torch.fx.experimental import symbolic_shapes  # takes longer than all else here

        original = getattr(symbolic_shapes.ShapeEnv, "evaluate_expr", None)
        if original is None:
            yield
            return

        @wraps(original)
        def evaluate(shapes: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(shapes, asked, *args, **kwargs)
            except symbolic_shapes.GuardOnDataDependentSymNode:
                if (answer := self._answer(asked)) is None:
                    raise
                return answer

        symbolic_shapes.ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            symbolic_shapes.ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]

    def _answer(self, asked: Any) -> Any:
        """The value of an expression in the call, which becomes a condition; None if unknown."""
        import sympy

        known = dict(self._sizes)
        for symbol in asked.free_symbols - known.keys():
            if (of := self._value(symbol)) is None:
                return None
            asked = asked.xreplace({symbol: of.symbol})
            known[of.symbol] = sympy.sympify(self._numbers[of])
        answer = asked.xreplace(known)
        if answer.free_symbols:
            return None
        if answer in (sympy.true, sympy.false):
            held = asked if answer == sympy.true else sympy.Not(asked)
        else:
            held = sympy.Eq(asked, answer)
        self.relations[held] = None
        return answer

    def _value(self, symbol: Any) -> CallValue | None:
        """What computes a number, which may be the same as another; None if unknown."""
        if symbol in self._read or self._tracer is None:
            return self._read.get(symbol)
        read = [n for n in self._tracer.graph.nodes if symbol in _symbols_of(n)]
        code = self._code(read[0]) if read else None
        if code is None or any(self.given[i].device.type == "meta" for i in code.leaves):
            return None
        key = structural_key(code.module.graph), code.leaves, code.constants
        if key not in self.values:
            is_bool = isinstance(value(read[0]), torch.SymBool)
            of = CallValue(symbol, code.leaves, code.module, self._words(), is_bool)
            with (
                torch._C.DisableTorchFunction(), unset_fake_temporarily(),
                proxy_tensor.disable_proxy_modes_tracing(),
            ):  # fmt: skip
                self._numbers[of] = of.of(self.given)
            self.values[key] = of
        self._read[symbol] = self.values[key]
        return self._read[symbol]

    def _code(self, read: fx.Node) -> _Code | None:
        """What computes the number that a node reads; None where it depends on more than the call."""
        needed = needed_for([read])
        if not all(map(self._is_of_call, needed)) or _in_autocast(read.graph) & {*needed}:
            return None
        graph, copies, leaves = fx.Graph(), {}, []
        written = {alias_root(w) for n in needed for w in mutated(n)}
        for node in needed:
            if node in self._places:
                leaves.append(self._places[node])
                copies[node] = graph.placeholder(node.name)
                if node in written:
                    copies[node] = graph.call_function(torch.clone, (copies[node],))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {}  # of the trace
        graph.output(copies[read])
        names = [str(n.target) for n in needed if n.op == "get_attr"]
        constants = {name: getattr(self._tracer.root, name) for name in names}
        module = fx.GraphModule(constants, graph)
        return _Code(tuple(leaves), module, tuple(map(id, constants.values())))

    def _is_of_call(self, node: fx.Node) -> bool:
        if node.op == "placeholder" or node in self._places:
            return node in self._places
        if node.op == "get_attr":
            return isinstance(getattr(self._tracer.root, str(node.target), None), torch.Tensor)
        plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        return node.op == "call_function" and not is_random(node) and (plain or _is_of_sizes(node))

    def _words(self) -> str:
        lines = [f for f in traceback.extract_stack() if f.filename in self.files]
        return (
            f"the number read in {lines[-1].line!r}" if lines else "a number read off its tensors"
        )


@dataclass(frozen=True)
class _Code:
    """See `CallValue`. constants: of tensors in it, which of the trace's they are."""

    leaves: tuple[int, ...]
    module: fx.GraphModule
    constants: tuple[int, ...]


def _in_autocast(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a trace's regions of autocast, whose operations compute in another dtype."""
    found, depth = set(), 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += (name == "_enter_autocast") - (name == "_exit_autocast")
        if depth:
            found.add(node)
    return found


def _symbols_of(node: fx.Node) -> set[Any]:
    return getattr(expression(value(node)), "free_symbols", set())


def _is_of_sizes(node: fx.Node) -> bool:
    """Whether it computes with Python numbers."""
    return isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))
