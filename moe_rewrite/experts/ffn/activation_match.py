"""Match a feed-forward region's operations to a fused form.

The operations between the products are read as a polynomial in the products and in functions (tanh,
erf, ...) of polynomials. So a handwritten GELU is recognised, whatever the order of its terms; with
an operation that is unknown here (a clamp, for example) a region has no fused form.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.ops import argument, op_name, output_of
from ...ir.program import Code

aten = torch.ops.aten
DIGITS = 6  # compared in coefficients; models write sqrt(2 / pi) with eight digits or more
MOST = 64  # terms of a polynomial

Half = tuple[int, int | None]  # (index of a product, which half of it; None: all of it)
Atom = tuple[str, Any]  # ("product", Half), or (function, frozen polynomial)
Term = frozenset[tuple[Atom, int]]  # atoms with their powers
Polynomial = dict[Term, float]


@dataclass(frozen=True)
class FusedFFN:
    """down(act(up x)), or down(act(gate x) * up x)."""

    activation: str
    up: Half
    gate: Half | None = None


def find_fused_form(middle: Code, widths: Sequence[int]) -> FusedFFN | None:
    """The fused form that computes `middle` of products of these widths, or None."""
    try:
        found = _frozen(_read(middle.module.graph, widths))
    except _Unknown:
        return None
    return next((form for form, made in _candidates(widths) if _frozen(made) == found), None)


class _Unknown(Exception):
    """An operation that no fused form contains."""


# -- polynomials -----------------------------------------------------------------------------------


def _constant(number: float) -> Polynomial:
    return {frozenset(): float(number)}


def _atom(kind: str, of: Any) -> Polynomial:
    return {frozenset({((kind, of), 1)}): 1.0}


def _plus(a: Polynomial, b: Polynomial, factor: float = 1.0) -> Polynomial:
    return {t: a.get(t, 0.0) + factor * b.get(t, 0.0) for t in a | b}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    made: Polynomial = {}
    for s, x in a.items():
        for t, y in b.items():
            powers = dict(s)
            for atom, power in t:
                powers[atom] = powers.get(atom, 0) + power
            term = frozenset(powers.items())
            made[term] = made.get(term, 0.0) + x * y
    if len(made) > MOST:
        raise _Unknown
    return made


def _power(a: Polynomial, exponent: Any) -> Polynomial:
    if exponent not in (1, 2, 3):
        raise _Unknown
    made = a
    for _ in range(int(exponent) - 1):
        made = _times(made, a)
    return made


def _frozen(a: Polynomial) -> frozenset[tuple[Term, float]]:
    """A key that is equal for polynomials whose coefficients agree to DIGITS digits."""
    return frozenset((t, _rounded(c)) for t, c in a.items() if c)


def _rounded(number: float) -> float:
    if not math.isfinite(number):
        raise _Unknown
    return round(number, DIGITS - 1 - math.floor(math.log10(abs(number))))


def _function(name: str) -> Callable[[Polynomial], Polynomial]:
    return lambda a: _atom(name, _frozen(a))


_relu, _sigmoid, _tanh, _erf = map(_function, ("relu", "sigmoid", "tanh", "erf"))


def _half_of(x: Polynomial, weight: Polynomial) -> Polynomial:
    """``x (1 + weight) / 2``."""
    return _times(_times(_constant(0.5), x), _plus(_constant(1.0), weight))


def _gelu(x: Polynomial) -> Polynomial:
    return _half_of(x, _erf(_times(_constant(0.5**0.5), x)))


def _gelu_tanh(x: Polynomial) -> Polynomial:
    inner = _plus(x, _power(x, 3), 0.044715)
    return _half_of(x, _tanh(_times(_constant((2 / math.pi) ** 0.5), inner)))


ACTIVATIONS: dict[str, Callable[[Polynomial], Polynomial]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: _times(x, _sigmoid(x)),
    "relu2": lambda x: _power(_relu(x), 2),
    "quick_gelu": lambda x: _times(x, _sigmoid(_times(_constant(1.702), x))),
    "identity": lambda x: x,
}


def _candidates(widths: Sequence[int]) -> Iterator[tuple[FusedFFN, Polynomial]]:
    """Each fused form of products of these widths, with the polynomial that it computes."""
    pairs: list[tuple[Half, Half]] = []
    if len(widths) == 1:
        pairs = [((0, 0), (0, 1)), ((0, 1), (0, 0))]
    elif len(widths) == 2:
        pairs = [((0, None), (1, None)), ((1, None), (0, None))]
    for name, act in ACTIVATIONS.items():
        if len(widths) == 1:
            yield FusedFFN(name, (0, None)), act(_atom("product", (0, None)))
        for gate, up in pairs:
            made = _times(act(_atom("product", gate)), _atom("product", up))
            yield FusedFFN(name, up, gate), made


# -- graphs ----------------------------------------------------------------------------------------


def _read(graph: fx.Graph, widths: Sequence[int]) -> Polynomial:
    """The polynomial of a graph whose inputs are products of x. Raises _Unknown."""
    inputs = graph.find_nodes(op="placeholder")
    if len(inputs) != len(widths):  # it takes further weights
        raise _Unknown
    made: dict[fx.Node, Any] = {n: _atom("product", (i, None)) for i, n in enumerate(inputs)}

    def value(given: Any) -> Polynomial:
        if isinstance(given, (bool, complex)) or not isinstance(given, (int, float, fx.Node)):
            raise _Unknown
        found = made[given] if isinstance(given, fx.Node) else _constant(given)
        if not isinstance(found, dict):
            raise _Unknown
        return found

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            parts, index = node.args
            made[node] = made[parts][index]
        elif node.target in HALVES:
            product = argument(node, "self")
            made[node] = HALVES[node.target](node, _product(made[product], widths))
        else:
            made[node] = _operation(node, value)
    return value(output_of(graph))


def _product(given: Any, widths: Sequence[int]) -> tuple[int, int]:
    """(index, width) of a product, which must be whole."""
    for number, width in enumerate(widths):
        if given == _atom("product", (number, None)):
            return number, width
    raise _Unknown


def _both(number: int) -> tuple[Polynomial, Polynomial]:
    return _atom("product", (number, 0)), _atom("product", (number, 1))


def _chunked(node: fx.Node, product: tuple[int, int]) -> Any:
    number, width = product
    if argument(node, "chunks") != 2 or width % 2:
        raise _Unknown
    return _both(number)


def _split(node: fx.Node, product: tuple[int, int]) -> Any:
    number, width = product
    name = "split_size" if node.target is aten.split.Tensor else "split_sizes"
    if argument(node, name) not in (width / 2, [width / 2, width / 2]):
        raise _Unknown
    return _both(number)


def _sliced(node: fx.Node, product: tuple[int, int]) -> Polynomial:
    number, width = product
    bounds = slice(*(argument(node, name) for name in ("start", "end", "step")))
    if any(isinstance(bound, fx.Node) for bound in (bounds.start, bounds.stop, bounds.step)):
        raise _Unknown
    first, last, step = bounds.indices(width)
    if step != 1 or (2 * first, 2 * last) not in ((0, width), (width, 2 * width)):
        raise _Unknown
    return _both(number)[0 if first == 0 else 1]


HALVES: dict[Any, Callable[[fx.Node, tuple[int, int]], Any]] = {
    aten.chunk.default: _chunked,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.slice.Tensor: _sliced,
}
UNARY: dict[str, Callable[[Polynomial], Polynomial]] = {
    "relu": _relu, "sigmoid": _sigmoid, "tanh": _tanh, "erf": _erf, "silu": ACTIVATIONS["silu"],
    "square": lambda x: _power(x, 2), "neg": lambda x: _times(_constant(-1.0), x),
}  # fmt: skip


def _operation(node: fx.Node, value: Callable[[Any], Polynomial]) -> Polynomial:
    name = op_name(node).removesuffix("_")
    if name not in (*UNARY, "gelu", "add", "sub", "rsub", "mul", "div", "pow"):
        raise _Unknown
    x = value(argument(node, "self"))
    if name in UNARY:
        return UNARY[name](x)
    if name == "gelu":
        return (_gelu_tanh if argument(node, "approximate") == "tanh" else _gelu)(x)
    if name == "pow":
        exponent = argument(node, "exponent")
        if isinstance(exponent, fx.Node):
            raise _Unknown
        return _power(x, exponent)
    y = value(argument(node, "other"))
    if name == "mul":
        return _times(x, y)
    if name == "div":
        return _divided(node, x, y)
    factor = argument(node, "alpha")
    if name == "rsub":
        return _plus(y, x, -factor)
    return _plus(x, y, factor if name == "add" else -factor)


def _divided(node: fx.Node, x: Polynomial, y: Polynomial) -> Polynomial:
    number = y.get(frozenset(), 0.0)
    plain = node.target in (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar)
    if len(y) != 1 or not number or not plain:
        raise _Unknown
    return _times(x, _constant(1 / number))
