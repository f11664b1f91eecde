"""Which modules of a model are alike: their forward does the same with other tensors.

Alike are modules of the same class, attribute by attribute and submodule by submodule, with
parameters of the same shapes. Whole numbers may differ (the index of a layer): `Index` notices if
forward looks at one, and then only modules with the same number are alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from ...utils.content_key import content_key

REGISTERED = ("_parameters", "_buffers", "_modules")
BINARY = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "divmod", "pow", "lshift", "rshift",
    "and", "or", "xor",
)  # fmt: skip
OTHER = (
    "eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "float", "int", "index", "neg", "pos",
    "abs", "invert", "round", "trunc", "str", "repr", "format",
)  # fmt: skip
LEAST = 3  # modules that are alike: two are traced, so the third is the first to gain


class Index(int):
    """A number that notices when code computes with it, compares it or prints it. Taking an element
    of a list by it goes unnoticed. looked: the names of the numbers that were looked at."""

    name: str
    looked: set[str]

    @classmethod
    def of(cls, number: int, name: str, looked: set[str]) -> Index:
        made = cls(number)
        made.name, made.looked = name, looked
        return made


def _noticing(method: str) -> Callable:
    plain = getattr(int, method)

    def look(self: Index, *args: Any) -> Any:
        self.looked.add(self.name)
        return plain(self, *args)

    return look


_names = [f"__{n}__" for n in (*BINARY, *OTHER)] + [f"__r{n}__" for n in BINARY]
for _method in _names:
    setattr(Index, _method, _noticing(_method))


def plain_number(given: Any) -> Any:
    """The int that an Index stands for; anything else as it is."""
    return int.__add__(given, 0) if isinstance(given, Index) else given


def repeated_blocks(model: nn.Module) -> dict[nn.Module, tuple]:
    """The form of every module that is alike to others, and not inside another such module.

    Modules are alike if their forms are equal and so are the numbers that their forward looks at.
    """
    known: dict[nn.Module, tuple] = {}
    forms = {m: form_of(m, known) for name, m in model.named_modules() if name and _is_block(m)}
    count = Counter(forms.values())
    found: dict[nn.Module, tuple] = {}

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if child in forms and count[forms[child]] >= LEAST:
                found[child] = forms[child]
            else:
                walk(child)

    walk(model)
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether it is worth a record of its own: it holds other modules, and has a forward."""
    forward = type(module).forward
    return bool(module._modules) and forward is not nn.Module.forward


def form_of(module: nn.Module, known: dict[nn.Module, tuple] | None = None) -> tuple:
    """What modules that are alike have in common; see the module docstring. known: attributes of
    modules inside others, which are collected once."""
    first: dict[int, str] = {}
    tensors = tuple(
        (name, type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad,
         first.setdefault(id(t), name))
        for named in (module.named_parameters, module.named_buffers)
        for name, t in named(remove_duplicate=False)
    )  # fmt: skip
    known = {} if known is None else known
    children = tuple((n, m and _attributes(m, known)) for n, m in module._modules.items())
    return type(module), _own(module, hooks=False), children, tensors


def _attributes(module: nn.Module, known: dict[nn.Module, tuple]) -> tuple:
    if module not in known:
        children = tuple((n, m and _attributes(m, known)) for n, m in module._modules.items())
        known[module] = type(module), _own(module, hooks=True), children
    return known[module]


def _own(module: nn.Module, hooks: bool) -> tuple:
    """The module's own attributes. hooks: those that are called around its forward too."""
    own = []
    for name, given in vars(module).items():
        if name.startswith("_") and "hooks" in name:
            given = [getattr(h, "__qualname__", "") for h in given.values()] if hooks else None
        if name not in REGISTERED:
            own.append((name, int if type(given) is int else _key(given, module)))
    return tuple(own)


def _key(given: Any, module: nn.Module) -> Any:
    """By content where that is known; functions and other objects are alike only if identical."""

    def other(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(content_key(v, other) for v in value)
        if isinstance(value, partial):
            return content_key((value.func, value.args, value.keywords), other)
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType, value.__func__
        return id(value)

    return content_key(given, other)


def numbers_of(module: nn.Module) -> dict[str, int]:
    """The whole numbers among the attributes of a module and its submodules, by dotted name."""
    return {f"{path}.{name}": given for path, _, name, given in _numbers(module)}


def _numbers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    for path, inner in module.named_modules():
        for name, given in list(vars(inner).items()):
            if type(given) is int:
                yield path, inner, name, given


def varying_numbers(modules: list[nn.Module]) -> set[str]:
    """The dotted names of the numbers in which modules of one form differ."""
    each = [numbers_of(m) for m in modules]
    return {name for name, given in each[0].items() if any(e[name] != given for e in each)}


@contextmanager
def noticing(module: nn.Module, varying: set[str], looked: set[str]) -> Iterator[None]:
    """In this context, an Index stands in place of each of these numbers."""
    numbers = [n for n in _numbers(module) if f"{n[0]}.{n[2]}" in varying]
    for path, inner, name, given in numbers:
        inner.__dict__[name] = Index.of(given, f"{path}.{name}", looked)
    try:
        yield
    finally:
        for _, inner, name, given in numbers:
            inner.__dict__[name] = given
