"""Facts beside its tensors that a call's graph rests on: the configuration, and ints."""

from __future__ import annotations

import copy
from typing import Any


class ConfigStates:
    """Numbers the states of a model's configuration, whose values a trace reads as constants."""

    def __init__(self, config: Any) -> None:
        self._configs = _with_nested(config)
        self._states = [self._snapshot()]
        self._current = 0

    def current(self) -> int:
        if not self._is(self._states[self._current]):
            found = (i for i, state in enumerate(self._states) if self._is(state))
            self._current = next(found, len(self._states))
            if self._current == len(self._states):
                self._states.append(self._snapshot())
        return self._current

    def _is(self, state: list[dict[str, Any]]) -> bool:
        return all(vars(c) == kept for c, kept in zip(self._configs, state, strict=True))

    def _snapshot(self) -> list[dict[str, Any]]:
        nested = {id(c): c for c in self._configs}  # compared by themselves
        return [copy.deepcopy(vars(config), dict(nested)) for config in self._configs]


def _with_nested(config: Any) -> list[Any]:
    """A configuration of Hugging Face's and those inside it; none of another kind."""
    if not hasattr(config, "to_dict") or not hasattr(config, "__dict__"):
        return []
    return [config] + [c for v in vars(config).values() for c in _with_nested(v)]


class ChangingInts:
    """Which arguments are ints that change from call to call: one graph serves all their values.

    An int is a constant of the graph until a call brings another one, and stays one where a graph
    cannot be captured otherwise. 0 and 1 are constants always, which PyTorch's capture makes them.
    """

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._changing: set[str] = set()
        self._constant: set[str] = set()

    def among(self, arguments: dict[str, Any]) -> frozenset[str]:
        ints = {n: v for n, v in arguments.items() if type(v) is int and n not in self._constant}
        for name, given in ints.items():
            if self._first.setdefault(name, given) != given:
                self._changing.add(name)
        return frozenset(n for n in self._changing & ints.keys() if ints[n] not in (0, 1))

    def keep_constant(self, names: frozenset[str]) -> None:
        self._constant |= names
