"""Slow sweeps: a few of their cases in every run, the others with ``pytest -m sweep``."""

import pytest


def some(names, few):
    """All names as cases of a test; those not in `few` are marked as a sweep."""
    return [name if name in few else _in_sweep(name) for name in names]


def _in_sweep(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.sweep)
