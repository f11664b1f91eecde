"""One call of a converted model: its tensors as a graph takes them, and its signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InputError
from ...frontend.arguments import is_channels_last, leaves_of
from ...utils.content_key import content_key


@dataclass(frozen=True)
class Call:
    """leaves: its tensors, and ints that are inputs, in order. mode: "eval" or "train".
    device: type of the model's. ints: arguments whose ints are inputs. key: equal for the calls
    that one graph may serve."""

    arguments: dict[str, Any]
    leaves: list[Any]
    mode: str
    device: str
    ints: frozenset[str]
    key: tuple

    @classmethod
    def of(
        cls, arguments: dict[str, Any], mode: str, where: tuple, ints: frozenset[str] = frozenset()
    ) -> Call:
        """where: device, dtype and more of the model that a trace takes as constants.

        The key holds structure, dtypes, ranks and layouts of the tensors, and the values of the
        constants. Raises InputError for a constant that cannot be compared by value.
        """
        leaves: list[Any] = []
        of_tensors: list[tuple] = []
        of_constants: list[tuple] = []
        for name, given in arguments.items():
            own = leaves_of(given)
            tensors = [isinstance(t, torch.Tensor) for t in own]
            if name in ints or (tensors and all(tensors)):
                leaves += own
                of_tensors.append((name, _form(given, own)))
            elif any(tensors):
                raise InputError(f"{name} mixes tensors and other values: pass tensors only")
            else:
                of_constants.append((name, content_key(given, _no_content(name))))
        key = mode, where, tuple(of_tensors), frozenset(of_constants)
        return cls(arguments, leaves, mode, where[0].type, ints, key)


def _form(given: Any, leaves: list[Any]) -> tuple:
    """(dtype, rank, layout) of a tensor; of a container, its type and those of its elements."""
    if isinstance(given, torch.Tensor):
        return given.dtype, given.ndim, is_channels_last(given)
    if isinstance(given, int):
        return (int,)
    if isinstance(given, dict):
        return type(given), tuple((k, _form(v, leaves_of(v))) for k, v in given.items())
    if isinstance(given, (list, tuple)):
        return type(given), tuple(_form(v, leaves_of(v)) for v in given)
    kinds = getattr(given, "kinds", ())  # of a paged cache's layers
    return type(given), kinds, tuple(_form(t, [t]) for t in leaves)


def _no_content(name: str) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        raise InputError(
            f"{name} holds a {type(value).__name__}, which cannot be distinguished from another by "
            "its content, so no graph could be kept for it: pass tensors, NumPy arrays, bools, "
            "numbers, strings, or lists, tuples and dicts of these"
        )

    return refuse
