"""The class of a converted model: tools that read a class find the original's there.

Trainers take the names of columns and labels from the signature of `forward`, and choose a loss by
the class's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn

CODE = (FunctionType, MethodType, property, classmethod, staticmethod, functools.cached_property)
KEPT: dict[tuple[type, type], type] = {}


def class_like(base: type, module: nn.Module, others: tuple[type, ...] = ()) -> type:
    """A subclass of `base` with the name of the module's class, the signature, annotations and
    documentation of its `forward`, and the values of its class attributes.

    others: bases after `base`; attributes that they inherit are not overwritten by those of theirs.
    """
    kind = type(module)
    own = "forward" in vars(module)  # set on this object, so the class is not kept for others
    if not own and (base, kind) in KEPT:
        return KEPT[base, kind]
    members = class_values(kind, base)
    members["forward"] = forward_like(module.forward if own else kind.forward, bound=own)
    members |= {"__module__": "moe_rewrite", "__doc__": base.__doc__}
    members["__qualname__"] = f"MoEModel[{kind.__qualname__}]"
    made = type(kind.__name__, (base, *others), members)
    if not own:
        KEPT[base, kind] = made
    return made


def class_values(kind: type, base: type) -> dict[str, Any]:
    """The values among a class's attributes, those of its own bases up to a library's included,
    that `base` does not have itself."""
    found: dict[str, Any] = {}
    for of in reversed(kind.__mro__):
        if of.__module__.startswith("torch.nn.") or of is object:
            continue
        for name, value in vars(of).items():
            data = isinstance(value, type) or not (isinstance(value, CODE) or callable(value))
            if data and not name.startswith("__"):
                found[name] = value
    return {name: value for name, value in found.items() if not hasattr(base, name)}


def values_before_class(made: nn.Module, base: type, module: nn.Module) -> dict[str, Any]:
    """The values of a module that its conversion's class would hide with values of its own."""
    of_class, own = type(made), vars(made)
    return {
        name: value
        for name, value in vars(module).items()
        if name not in own and hasattr(of_class, name) and not hasattr(base, name)
        and not isinstance(inspect.getattr_static(of_class, name), CODE)
    }  # fmt: skip


def forward_like(original: Callable[..., Any], bound: bool) -> Callable[..., Any]:
    """`forward` of a converted model, which `inspect.signature` shows as the original's.

    bound: `original` takes no `self`.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.with_plan(*args, **kwargs)[0]

    shown = functools.wraps(original)(forward)
    if bound:
        own = inspect.signature(original)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shown.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    return shown
