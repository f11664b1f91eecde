"""Checks of options: a wrong value is an error that names it and what was expected."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def require(ok: bool, what: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{what}={value!r}: expected {expected}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose(spec: object, name: str, *choices: str | None) -> None:
    value = getattr(spec, name)
    expected = " or ".join(map(repr, choices))
    require(value in choices, f"{type(spec).__name__} {name}", value, expected)


DTYPES = ("float32", "bfloat16", "float16", "float64")


def named_dtype(spec: Any) -> None:
    """Check a spec's dtype and store it by name, as saves do."""
    name = str(spec.dtype).removeprefix("torch.")
    require(
        spec.dtype is None or name in DTYPES, f"{type(spec).__name__} dtype", spec.dtype,
        f"None or one of {', '.join(DTYPES)}",
    )  # fmt: skip
    object.__setattr__(spec, "dtype", None if spec.dtype is None else name)


def ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of these, or ends in one."""
    return any(name == e or name.endswith("." + e) for e in endings)


def name_endings(spec: Any, *words: str) -> None:
    """Check a spec's sites, one of these words or endings of names, and store endings as a tuple."""
    given = spec.sites
    endings = tuple(given) if isinstance(given, list) else given
    named = isinstance(endings, tuple) and all(isinstance(s, str) for s in endings)
    require(
        endings in words or (named and len(endings) > 0), f"{type(spec).__name__} sites", given,
        f"{', '.join(map(repr, words))} or a list of endings of names",
    )  # fmt: skip
    object.__setattr__(spec, "sites", endings)
