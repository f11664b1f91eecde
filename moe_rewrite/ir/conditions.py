"""What a graph takes for granted about a call, and the check of it.

torch.export reads facts off its example: sizes that are constants of the graph, sizes that are equal
or follow from others, branches taken (``length <= 16``, ``length % 4 == 1``). Each is a condition of
the graph: a call that does not meet it needs another graph. So is a branch on a number that the
model's code reads off the call's tensors (``if mask.any():``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .aten import expression, value
from .call_values import CallValue

if TYPE_CHECKING:  # importing it takes longer than all the rest
    import sympy

Place = tuple[int, int]  # (leaf, dimension); the dimension is -1 for a leaf that is an int
Pattern = tuple[int, ...]


@dataclass(frozen=True)
class Conditions:
    """Of the leaves of a call: its tensors, and ints that are inputs of the graph.

    leaves: their names.
    open: sympy symbol -> the place that gives its value, for every size that may differ.
    sizes: (place, int or expression in these symbols) that the other sizes must equal.
    relations: sympy relations of the symbols that must hold.
    values: numbers computed from the leaves, whose symbols are in relations too.
    """

    leaves: tuple[str, ...]
    open: tuple[tuple[sympy.Symbol, Place], ...]
    sizes: tuple[tuple[Place, Any], ...]
    relations: tuple[Any, ...]
    values: tuple[CallValue, ...] = ()

    def pattern(self, leaves: list[Any]) -> Pattern | None:
        """None if a condition does not hold; else of every open size whether it is 0, 1 or more.

        Capture assumes that open sizes are 2 or more, without a trace of where it matters: a graph
        needs a check of its own for every pattern with a 0 or a 1.
        """
        return self._check(*leaves)

    @cached_property
    def _check(self) -> Callable[..., Pattern | None]:
        """Generated code, since it runs at every call."""
        names = {symbol: f"s{i}" for i, (symbol, _) in enumerate(self.open)}
        names |= {of.symbol: f"v{i}" for i, of in enumerate(self.values)}
        given = [f"t{i}" for i in range(len(self.leaves))]
        lines = [f"{names[symbol]} = {_code(place)}" for symbol, place in self.open]
        wanted = [f"{_code(place)} == {_printed(size, names)}" for place, size in self.sizes]
        wanted += [_printed(relation, names) for relation in self._of_sizes]
        lines += _unless(wanted)
        lines += [f"v{i} = value{i}(({', '.join(given)},))" for i in range(len(self.values))]
        lines += _unless([_printed(relation, names) for relation in self._of_values])
        sizes = [names[symbol] for symbol, (_, dim) in self.open if dim >= 0]
        lines.append(f"return ({''.join(f'{n} if {n} < 2 else 2, ' for n in sizes)})")
        body = "\n    ".join(lines)
        scope: dict[str, Any] = {"math": __import__("math"), "torch": torch}
        scope |= {f"value{i}": of.of for i, of in enumerate(self.values)}
        exec(f"def check({', '.join(given)}):\n    {body}", scope)
        return scope["check"]

    def violated(self, leaves: list[Any]) -> str | None:
        """The first condition that does not hold, in words; None if all do."""
        import sympy

        values = {symbol: sympy.Integer(_size(leaves, place)) for symbol, place in self.open}
        for place, size in self.sizes:
            wanted = size if isinstance(size, int) else size.xreplace(values)
            if (found := _size(leaves, place)) != wanted:
                return f"{self._named(place)} is {found}: expected {self._words(size)}"
        for relation in self._of_sizes:
            if relation.xreplace(values) == sympy.false:
                return f"{self._words(relation)} does not hold"
        values |= {of.symbol: sympy.sympify(of.of(leaves)) for of in self.values}
        for relation in self._of_values:
            if relation.xreplace(values) == sympy.false:
                return f"{self._words(relation)} does not hold"
        return None

    @cached_property
    def _of_values(self) -> list[Any]:
        """Relations of numbers that are computed, which costs more than to look at sizes."""
        symbols = {of.symbol for of in self.values}
        return [r for r in self.relations if r.free_symbols & symbols]

    @cached_property
    def _of_sizes(self) -> list[Any]:
        return [r for r in self.relations if r not in self._of_values]

    @property
    def constant(self) -> set[Place]:
        """Places of sizes that are constants of the graph."""
        return {place for place, size in self.sizes if isinstance(size, int)}

    @property
    def same_as(self) -> dict[Place, Place]:
        """Places whose size is the open size of another place."""
        opened = dict(self.open)
        return {place: opened[size] for place, size in self.sizes if size in opened}

    @property
    def largest(self) -> dict[Place, int]:
        """The largest value of the open sizes that are bounded."""
        opened, found = dict(self.open), {}
        for relation in self.relations:
            bound = relation.func.__name__ == "LessThan"
            if bound and relation.lhs in opened and relation.rhs.is_number:
                found[opened[relation.lhs]] = int(relation.rhs)
        return found

    @property
    def texts(self) -> list[str]:
        """Those that restrict a call beyond sizes that are constants, in words."""
        derived = [(place, size) for place, size in self.sizes if not isinstance(size, int)]
        equal = [f"{self._named(place)} == {self._words(size)}" for place, size in derived]
        return equal + [self._words(relation) for relation in self.relations]

    def _named(self, place: Place) -> str:
        leaf, dim = place
        return self.leaves[leaf] if dim < 0 else f"{self.leaves[leaf]}.shape[{dim}]"

    def _words(self, expr: Any) -> str:
        names = {symbol: self._named(place) for symbol, place in self.open}
        return _printed(expr, names | {of.symbol: of.words for of in self.values})


def _unless(wanted: list[str]) -> list[str]:
    """Code that returns None unless all of these hold."""
    held = " and ".join(f"({w})" for w in wanted)
    return [f"if not ({held}): return None"] if wanted else []


def relations_of(exported: Any, of_values: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """What torch.export states about the symbols of its result: ranges, and guards of branches.

    of_values: relations that hold besides, see `CallValue`.
    """
    import sympy
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    found: dict[Any, None] = {}
    for size, bounds in exported.range_constraints.items():
        # capture takes each symbol for 2 at least, and so a sum of two for 4, which restricts nothing
        taken = dict.fromkeys(size.free_symbols, ValueRanges(2, int_oo))
        least = bound_sympy(size, taken).lower
        if bounds.lower > max(2, least) or (bounds.lower == 0 and bounds.upper != sympy.oo):
            found[sympy.Ge(size, int(bounds.lower))] = None
        if bounds.upper.is_finite and bounds.upper < 2**62:
            found[sympy.Le(size, int(bounds.upper))] = None
    for environment in _environments(exported.graph):
        for relation in (*(guard.expr for guard in environment.guards), *of_values):
            found[_replaced(relation, environment.replacements)] = None
    return tuple(r for r in found if r not in (sympy.true, True))


def conditions_of(
    leaves: list[fx.Node], relations: tuple[Any, ...], values: tuple[CallValue, ...] = ()
) -> Conditions:
    """leaves: placeholders of a call's inputs, whose fake values have the sizes of the trace."""
    opened: dict[Any, Place] = {}
    others: list[tuple[Place, Any]] = []
    for place, size in _sizes(leaves):
        if getattr(size, "is_Symbol", False) and size not in opened:
            opened[size] = place
        else:
            others.append((place, size))
    known = {*opened, *(of.symbol for of in values)}
    ranges = {r for of in values if of.is_bool for r in (of.symbol >= 0, of.symbol <= 1)}
    return Conditions(
        tuple(node.name for node in leaves),
        tuple(opened.items()),
        tuple((place, _fixed(size)) for place, size in others),
        tuple(r for r in relations if r.free_symbols <= known and r not in ranges),
        values,
    )


def _sizes(leaves: list[fx.Node]) -> list[tuple[Place, Any]]:
    found: list[tuple[Place, Any]] = []
    for i, node in enumerate(leaves):
        made = value(node)
        sizes = enumerate(made.shape) if isinstance(made, torch.Tensor) else [(-1, made)]
        found += [((i, d), expression(size)) for d, size in sizes]
    return found


def _fixed(size: Any) -> Any:
    """An int where an expression is a constant."""
    return int(size) if isinstance(size, int) or size.is_number else size


def _environments(graph: fx.Graph) -> list[Any]:
    """The ShapeEnvs of a graph's values: one, or none where all sizes are constants."""
    found: dict[int, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        made = value(node)
        sizes = made.shape if isinstance(made, torch.Tensor) else [made]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found[id(size.node.shape_env)] = size.node.shape_env
    return list(found.values())


def _replaced(expr: Any, replacements: dict[Any, Any]) -> Any:
    """With the symbols that capture found equal to others, or to constants, replaced by these."""
    for _ in range(len(replacements) + 1):
        if (after := expr.xreplace(replacements)) == expr:
            break
        expr = after
    return expr


def _code(place: Place) -> str:
    leaf, dim = place
    return f"t{leaf}" if dim < 0 else f"t{leaf}.shape[{dim}]"


def _size(leaves: list[Any], place: Place) -> int:
    leaf, dim = place
    return int(leaves[leaf] if dim < 0 else leaves[leaf].shape[dim])


def _printed(expr: Any, names: dict[sympy.Symbol, str]) -> str:
    """An expression as Python code, with these names for its symbols."""
    if isinstance(expr, int):
        return str(expr)
    import sympy
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expr.xreplace({s: sympy.Symbol(n) for s, n in names.items()}))
