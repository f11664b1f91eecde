"""Functions with a gradient of their own (torch.autograd.Function) stay whole in a graph.

torch.export traces their forward, whose derivative may be another one (straight-through estimators,
reversed or clipped gradients). Here each becomes an operator that runs the function itself, so that
its backward runs where the graph is differentiated; an export for other runtimes decomposes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import CaptureError
from ...ir.aten import value
from ...ir.ops import first, is_pointwise, op

SPACE = "moe_rewrite_functions"
_LIBRARY = torch.library.Library(SPACE, "FRAGMENT")
_PLAIN = Function.__dict__["apply"]  # whatever replaces it while tracing
_OPERATORS: dict[Any, tuple[Callable, _Whole]] = {}


@contextmanager
def whole_functions() -> Iterator[None]:
    """While a model is traced by this thread, its functions are operators. Not PyTorch's own, whose
    gradients are those of their forward."""
    tracer, replaced = threading.get_ident(), Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        own = not cls.__module__.startswith("torch.")
        tensors = any(isinstance(a, torch.Tensor) for a in args)
        if threading.get_ident() != tracer or not own or not tensors or kwargs:
            return replaced.__get__(None, cls)(*args, **kwargs)
        return _called(cls, args)

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Function.apply = replaced  # type: ignore[method-assign]


def _called(cls: type[Function], args: tuple) -> Any:
    """The function's outputs, by its operator: tensors and sizes are its inputs, all else is
    constant."""
    kinds = tuple(_kind(a) for a in args)
    inputs = [a for a, k in zip(args, kinds, strict=True) if k != "constant"]
    constants = tuple(a if k == "constant" else None for a, k in zip(args, kinds, strict=True))
    key: Any = (cls, kinds, constants, tuple(map(type, constants)))
    try:
        hash(key)
    except TypeError:  # by identity; the operator keeps the constants, so that ids stay theirs
        key = (cls, kinds, tuple(map(id, constants)))
    if key not in _OPERATORS:
        _OPERATORS[key] = _operator(_Whole(cls, kinds, constants), inputs)
    operator, whole = _OPERATORS[key]
    made = operator(*inputs)
    found = iter(made if isinstance(made, (list, tuple)) else [made])
    outputs = [next(found) if kept else None for kept in whole.kept]
    return tuple(outputs) if whole.several else outputs[0]


def function_of(node: fx.Node) -> type[Function] | None:
    """The function that a node's operator runs; None for any other operator."""
    return next((w.cls for o, w in _OPERATORS.values() if o is node.target), None)


def _kind(given: Any) -> str:
    if isinstance(given, torch.Tensor):
        return "Tensor"
    return "SymInt" if isinstance(given, torch.SymInt) else "constant"


class _Whole:
    """A function of its tensors and sizes. After a call: whether its outputs are `several`, and for
    each of them whether it is a tensor and so `kept`."""

    several, kept = False, [True]

    def __init__(self, cls: type[Function], kinds: tuple[str, ...], constants: tuple) -> None:
        self.cls, self.kinds, self.constants = cls, kinds, constants

    def __call__(self, *inputs: Any) -> Any:
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        versions, rest = [t._version for t in tensors], iter(inputs)
        both = zip(self.kinds, self.constants, strict=True)
        apply = _PLAIN.__get__(None, self.cls)
        made = apply(*(c if k == "constant" else next(rest) for k, c in both))
        if [t._version for t in tensors] != versions:
            raise CaptureError(
                f"{self.cls.__qualname__}, a torch.autograd.Function, writes into its inputs: let "
                "its forward return new tensors"
            )
        self.several = isinstance(made, tuple)
        outputs = made if isinstance(made, tuple) else (made,)
        self.kept = [isinstance(o, torch.Tensor) for o in outputs]
        kept = [o for o in outputs if isinstance(o, torch.Tensor)]
        return kept[0] if len(kept) == 1 else kept


def _operator(whole: _Whole, inputs: list[Any]) -> tuple[Callable, _Whole]:
    pointwise = getattr(whole.cls, "by_element", False) or _is_pointwise(whole, inputs)
    name = f"{whole.cls.__name__}_{len(_OPERATORS)}"
    given = ", ".join(f"{_kind(x)} x{i}" for i, x in enumerate(inputs))
    made = "Tensor" if sum(whole.kept) == 1 else "Tensor[]"
    tags = (torch.Tag.pointwise,) if pointwise else ()
    _LIBRARY.define(f"{name}({given}) -> {made}", tags=tags)
    _LIBRARY.impl(name, whole, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, SPACE), name).default, whole


def _is_pointwise(whole: _Whole, inputs: list[Any]) -> bool:
    """Whether the function is made of pointwise operations; runs it on tensors without values."""
    with _disable_current_modes(), FakeTensorMode():
        like = [
            torch.empty(_numbers(x.shape), dtype=x.dtype, device=x.device)
            if isinstance(x, torch.Tensor) else _numbers([x])[0]
            for x in inputs
        ]  # fmt: skip
        traced = make_fx(whole, tracing_mode="fake")(*like)
    works = [n for n in traced.graph.nodes if n.op == "call_function"]
    return sum(whole.kept) == 1 and all(map(_by_element, works))


def _by_element(node: fx.Node) -> bool:
    same = op(node).view and value(node).shape == value(first(node)).shape  # x.view_as(x)
    return is_pointwise(node) or same


def _numbers(sizes: Iterable[Any]) -> list[int]:
    return [s.node.hint if isinstance(s, torch.SymInt) else s for s in sizes]
